"""Everything that can be configured, frozen, with its default and the reason for it.

Sections are handed down one by one; nobody but app.py sees the whole. Inside, seconds are float and sizes are bytes; files,
flags and environment variables carry the unit in the key (`max_queue_delay_ms`). How they are read: config_loading.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from headrace.errors import ConfigError

INT32_MAX = 2**31 - 1


def _option(
    default: Any,
    doc: str,
    *,
    key: str = "",
    flag: str = "",
    scale: float = 1,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    secret: bool = False,
) -> Any:
    """A field with what its documentation, environment variable and flag are made from. `scale`: file value times scale = ours.

    `secret`: by environment variable only, and in no repr: flags are visible to everybody on the machine, files get copied.
    """
    metadata = {"doc": doc, "key": key, "flag": flag, "scale": scale, "choices": choices, "minimum": minimum, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """What sources that are not on this machine's disk need. `cache_directory` empty: see sources/cache.py."""

    cache_directory: str = ""
    cache_bytes: int = 20 << 30


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """headrace.toml, HEADRACE_… and the flags of `headrace serve`; each option has all three, secrets the variable alone."""

    models: tuple[str, ...] = _option((), "Model repositories: directories of <model>/<version>/<file>.")
    grpc: tuple[str, ...] = _option(
        ("127.0.0.1:8001",), "gRPC listeners, HOST:PORT or unix:PATH. Loopback by default: nothing is exposed that nobody asked for."
    )
    http: str = _option("127.0.0.1:8002", "HOST:PORT of metrics, health and the dashboard; empty: off.")
    transport: str = _option(
        "auto",
        "The gRPC implementation. native: HTTP/2 outside the interpreter, extra `native`, without TLS; auto: that where it can be used.",
        choices=("auto", "native", "grpcio"),
    )
    model_control: str = _option(
        "watch",
        "What changes the set of models at run time. watch: every source, at once where it can tell and by polling besides. poll: only "
        "every poll_interval_s. explicit: RepositoryModelLoad and Unload. none: what is there at start.",
        choices=("watch", "none", "poll", "explicit"),
    )
    load_models: tuple[str, ...] = _option((), "With model_control explicit: the models that are loaded at start, '*' for all.")
    poll_interval: float = _option(15.0, "Between looks at a source, with some jitter.", key="poll_interval_s", minimum=0.1)
    settle: float = _option(
        5.0, "How long files without a manifest must not have changed before they are taken: somebody may still be copying.",
        key="settle_s", minimum=0,
    )  # fmt: skip
    audit_log: str = _option("", "File to which every load, flip, label move, promotion and rollback is appended, one JSON line each.")
    watch_dry_run: bool = _option(False, "Say what would be served, and what would change while it is watched, and serve nothing.")
    server_name: str = _option("triton", "`name` in ServerMetadata. Existing clients and their examples assert 'triton'.")
    admin: str = _option(
        "local",
        "Who may promote, roll back, move labels and traffic over gRPC. local: callers on this machine; all others may look. on: every "
        "caller that can connect. off: nobody, and nobody may look.",
        choices=("local", "on", "off"),
    )
    log_format: str = _option("auto", "auto: console on a terminal, else JSON.", choices=("auto", "console", "json"))
    log_level: str = _option("info", "The least level that is logged.", choices=("debug", "info", "warning", "error"))
    access_log: bool = _option(False, "One JSON line per request on standard output.")
    tracing: str = _option(
        "",
        "Where spans of traced requests go, extra `otel`: http://HOST:PORT or https://HOST:PORT of an OTLP collector (gRPC), file:PATH "
        "for lines of OTLP JSON, console for standard error. Empty: nothing is traced.",
    )
    trace_fraction: float = _option(
        0.01, "Part of the requests that is traced, of those whose caller has not decided it by its own traceparent.", minimum=0
    )
    trace_max_per_second: float = _option(
        100.0, "Requests that are traced at most, also of those whose callers trace them: each costs some 0.3 ms of a core.", minimum=0
    )
    trace_service_name: str = _option("headrace", "`service.name` of the spans.")
    shutdown_grace: float = _option(30.0, "How long a stopping server finishes what it has admitted.", key="shutdown_grace_s", minimum=0)
    max_message_bytes: int = _option(INT32_MAX, "Largest message either way; the protocol's clients allow this much.", minimum=1024)
    max_inflight_bytes: int = _option(
        2 << 30, "Messages that wait for their answers, on the native transport and per listener; beyond it requests are refused at once.",
        minimum=1024,
    )  # fmt: skip
    client_shared_memory: bool = _option(
        False,
        "Clients on this machine may leave tensors in system shared memory. Off: whoever reaches the port could have the server read "
        "and write every shared memory object that its user may.",
    )
    client_cuda_shared_memory: bool = _option(
        False,
        "Clients on this machine may leave tensors in CUDA memory of theirs, by its IPC handle. Off: whoever reaches the port could have "
        "the server read and write what other processes share on its GPUs.",
    )
    tls_certificate: str = _option("", "PEM file of the server's certificate chain; with tls_key it turns TLS on for TCP listeners.")
    tls_key: str = _option("", "PEM file of the certificate's private key.")
    tls_client_ca: str = _option("", "PEM file of the authorities whose client certificates are required (mutual TLS).")
    load_threads: int = _option(2, "Versions that load at the same time.", minimum=1)
    shared_threads: int = _option(
        0,
        "Threads of one pool that all models of this process compute on, whatever their own `threads` say; 0: each instance has its own. "
        "For many models on many cores: idle threads of the pool spin for some 40 ms, so leave it fewer than there are; 1 spins nowhere.",
        minimum=0,
    )
    cache_directory: str = _option("", "Where versions from object stores and registries are kept; empty: headrace below the user's cache.")
    cache_bytes: int = _option(20 << 30, "Size of that cache; what no loaded version uses is deleted, the longest unused first.", minimum=0)
    webhook_secret: str = _option(
        "", "What MLflow signs its webhooks with; empty: /v2/webhooks/mlflow is off. Only as HEADRACE_WEBHOOK_SECRET.", secret=True
    )
    dashboard: bool = _option(
        True, "A page for browsers at the root of the http listener: it shows what metrics and admin show, and changes nothing."
    )
    drift: bool = _option(True, "Watch models for drift, as the [drift] of each says; off: none of them.")
    drift_webhooks: tuple[str, ...] = _option(
        (), "URLs that get each drift alert, promotion, rollback and failed load as a CloudEvent (docs/drift/act.md)."
    )
    drift_webhook_secret: str = _option(
        "", "What those deliveries are signed with; empty: they are not. Only as HEADRACE_DRIFT_WEBHOOK_SECRET.", secret=True
    )

    capture: str = _option(
        "", "Directory to which samples of requests and answers are written (docs/drift/capture-format.md); empty: none are."
    )
    capture_fraction: float = _option(1.0, "Part of the requests that is captured, of all models together.", minimum=0)
    capture_max_per_second: float = _option(10.0, "Requests that are captured at most.", minimum=0)
    capture_max_bytes: int = _option(1 << 30, "Size of that directory's captures; the oldest go when it is reached.", minimum=1 << 16)

    @property
    def sources(self) -> SourceConfig:
        return SourceConfig(self.cache_directory, self.cache_bytes)

    def __post_init__(self) -> None:
        for listener in self.grpc:
            check_listener("grpc", listener)
        if self.http:
            check_listener("http", self.http)
        for url in self.drift_webhooks:
            _check_url("drift_webhooks", url)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key: expected both or neither")
        if self.tracing and self.tracing != "console" and not self.tracing.startswith(("http://", "https://", "file:")):
            raise ConfigError(f"tracing: expected http://HOST:PORT, https://HOST:PORT, file:PATH or console, got {self.tracing!r}")
        if self.trace_fraction > 1:
            raise ConfigError(f"trace_fraction: expected 0 to 1, got {self.trace_fraction}")
        if self.capture_fraction > 1:
            raise ConfigError(f"capture_fraction: expected 0 to 1, got {self.capture_fraction}")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("tls_client_ca: expected tls_certificate and tls_key beside it")


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(f"{name}: expected http://HOST/PATH or https://HOST/PATH, got {url!r}")


def check_listener(name: str, listener: str) -> None:
    if listener.startswith("unix:") and name != "http":
        if not listener.removeprefix("unix:"):
            raise ConfigError(f"{name}: expected a path after 'unix:', got {listener!r}")
        return
    host, separator, port = listener.rpartition(":")
    if not (separator and host and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{name}: expected HOST:PORT{' or unix:PATH' if name != 'http' else ''}, got {listener!r}")


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Who runs together. All counts are rows, not requests, so that one large request counts as what it costs."""

    max_batch_size: int | None = _option(
        None, "Rows; left out: inferred from the artifact; 0: shapes are literal and nothing is batched.", minimum=0
    )
    max_queue_delay: float = _option(
        0.0, "How long a free instance waits for a batch to fill. 0: it runs what is there; waiting on an idle device only adds latency.",
        key="max_queue_delay_ms", scale=1e-3, minimum=0,
    )  # fmt: skip
    max_queue_size: int = _option(4096, "Rows that may wait; beyond it requests are refused at once. 0: unbounded.", minimum=0)
    allowed_batch_sizes: tuple[int, ...] = _option(
        (), "Ascending, the last is max_batch_size; batches are padded up to the next. Empty: any size.", minimum=1
    )
    priority_levels: int = _option(0, "Levels that the `priority` parameter may name, 1 the most urgent. 0: it is ignored.", minimum=0)
    default_priority_level: int = _option(0, "The level of requests that name none; 0: the middle one.", minimum=0)
    default_timeout: float = _option(
        0.0, "A request that has not started by then is refused. 0: never.", key="default_timeout_ms", scale=1e-3, minimum=0
    )
    allow_timeout_override: bool = _option(
        True, "Whether a request may set a `timeout` of its own, by which it wants its answer; it can only be shorter."
    )
    slo: float = _option(
        0.0,
        "Time within which each request is to be answered, from its arrival. One that cannot be, by what batches are seen to take, is "
        "refused (UNAVAILABLE) as soon as that is known, so that the others can. 0: none.",
        key="slo_ms",
        scale=1e-3,
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.default_priority_level > self.priority_levels:
            raise ConfigError(
                f"default_priority_level: expected at most priority_levels {self.priority_levels}, got {self.default_priority_level}"
            )
        if self.priority_levels and not self.default_priority_level:
            object.__setattr__(self, "default_priority_level", (self.priority_levels + 1) // 2)


_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    count: int = _option(1, "Loaded copies that run batches side by side.", minimum=1)
    device: str = _option(
        "auto",
        "cpu; cuda: the GPUs of this machine; cuda:N: that one of them; auto: GPUs where there are some and the backend can use them, else "
        "the CPU.",
    )
    threads: int = _option(0, "Threads of one instance; 0: the cores divided by the instances of this model.", minimum=0)
    options: Mapping[str, str] = field(default_factory=dict, metadata={"doc": "The backend's own options, by its own names."})

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """An override for one tensor; what is left out is as the artifact says."""

    name: str = _option("", "The tensor's name in the artifact.")
    datatype: str | None = _option(None, "Checked against the artifact's, e.g. FP32.")
    shape: tuple[int, ...] | None = _option(
        None, "Without the batch dimension; may only set dimensions that the artifact leaves free.", minimum=-1
    )
    optional: bool | None = _option(None, "Whether requests may leave the input out.")
    labels: str | None = _option(None, "File of class names beside model.toml, one a line (outputs only).")
    monitor: str = _option(
        "auto",
        "What of it is watched for drift. auto: chosen by datatype and shape. columns: each element of a row. categories: as columns, "
        "counted by value. image, audio: mean, deviation, extremes and sharpness, of each channel. embedding: norm and random "
        "projections. classes: scores of classes (outputs). off: nothing.",
        choices=("auto", "columns", "categories", "image", "audio", "embedding", "classes", "off"),
    )
    columns: tuple[str, ...] = _option((), "Names of a row's elements, in their order, by which features are called.")
    activation: str = _option(
        "auto",
        "What class scores are; auto: probabilities where the first rows add up to 1.",
        choices=("auto", "probabilities", "logits"),
    )
    minimum: float | None = _option(None, "Least value that an input may have.")
    maximum: float | None = _option(None, "Largest value that an input may have.")
    finite: bool = _option(False, "Whether an input must have no NaN and no infinity.")
    categories: tuple[str, ...] = _option((), "The values that an input may have, as text: strings, integers, true and false.")
    limits: str = _option(
        "none",
        "reference: each element of an input must be within what drift.msgpack has seen of it, where it is watched by itself (columns).",
        choices=("none", "reference"),
    )
    on_invalid: str = _option(
        "count",
        "What becomes of a request with other values. count: it is answered, and they are counted (headrace_invalid_values_total). refuse: "
        "INVALID_ARGUMENT with the first of them.",
        choices=("count", "refuse"),
    )


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """What is done to an input's images before the model sees them. Clients send them as UINT8 [rows, height, width, channels]."""

    input: str = _option("", "The input's name in the artifact; there it has four dimensions and FP32, FP16 or BF16.")
    size: tuple[int, ...] = _option(
        (), "Height and width that the model takes: images of any size are resized (bilinear). Left out: they come in its size.",
        minimum=1,
    )  # fmt: skip
    antialias: bool = _option(True, "Whether all pixels of a larger image count, as Pillow has it, or the four nearest to each.")
    scale: float = _option(1 / 255, "What pixels, 0 to 255, are multiplied by; 1/255 left out.")
    mean: tuple[float, ...] = _option((0.0,), "Subtracted after that; one number, or one for each channel in the model's order.")
    deviation: tuple[float, ...] = _option((1.0,), "Divided by after that; one number, or one for each channel in the model's order.")
    channels: str = _option("rgb", "The order that the model takes; clients send rgb.", choices=("rgb", "bgr"))
    layout: str = _option("NCHW", "How the model takes them: channels before height and width, or after.", choices=("NCHW", "NHWC"))
    max_pixels: int = _option(1 << 24, "Height times width of an image at most, where that is the client's choice.", minimum=1)


@dataclass(frozen=True, slots=True)
class PostprocessConfig:
    """What is done to an output's scores before clients get them. softmax and top_k: the probabilities of the most probable."""

    output: str = _option("", "The output's name in the artifact; there it is floating.")
    softmax: bool = _option(False, "Probabilities (FP32) in place of scores, along the last dimension.")
    top_k: int = _option(
        0,
        "So many of the largest of a row, the largest first, in place of all: NAME has the values (FP32), NAME_classes the "
        "classes that they are of (INT32). 0: all.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if not self.softmax and not self.top_k:
            raise ConfigError("expected softmax = true, top_k, or both")


@dataclass(frozen=True, slots=True)
class DriftConfig:
    """How live data is compared with a version's reference. What of it is watched is said at each tensor (`monitor`)."""

    reference: str = _option(
        "auto",
        "What is compared with. file: drift.msgpack in the version's directory. learn: the first learn_rows. auto: the file where there is "
        "one, else the live data of the version before it if that takes the same, else the first learn_rows. off: nothing is watched.",
        choices=("auto", "file", "learn", "off"),
    )
    learn_rows: int = _option(2000, "Rows that a reference is learnt from where there is none.", minimum=100)
    max_features: int = _option(32, "Watched of one tensor; what is left out is said at load.", minimum=1)
    bins: int = _option(10, "Ranges into which values of a feature are counted, with about as many rows each in the reference.", minimum=2)
    window_rows: int = _option(1000, "Rows after which a window ends and is compared.", minimum=10)
    window: float = _option(300.0, "After so long a window ends with fewer, if there are min_rows of them.", key="window_s", minimum=0.1)
    min_rows: int = _option(100, "Fewer than that are not compared.", minimum=10)
    sliding_windows: int = _option(12, "The last so many windows are compared together as well.", minimum=2)
    alpha: float = _option(
        0.001, "Chance that a window raises an alert although nothing has drifted, over all features together.", minimum=0
    )
    min_psi: float = _option(0.05, "Smaller shifts are no drift, however sure they are (PSI).", minimum=0)
    budget: float = _option(
        0.01, "CPU time of counting, as a part of what inference takes; beyond it batches are left out. 0: every row is counted.", minimum=0
    )

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha: expected more than 0 and less than 1, got {self.alpha:g}")


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """What of a model may be captured, where the server captures at all."""

    enabled: bool = _option(True, "Whether requests for this model may be captured. It is the server's option `capture` that turns it on.")
    redact: tuple[str, ...] = _option((), "Inputs and outputs whose content is never written: name, datatype and shape alone are.")


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """Labels that come after the answers, by request id."""

    enabled: bool = _option(False, "Keep what was predicted for each request id, so that labels can be joined with it.")
    output: str = _option("", "The output that labels are for; left out: one with labels, else scores of classes, else the first.")
    kind: str = _option(
        "auto",
        "classification: labels are classes; regression: they are numbers; auto: by the output's shape and datatype.",
        choices=("auto", "classification", "regression"),
    )
    keep_rows: int = _option(100_000, "Predictions that wait for their labels, the latest; each takes some 300 bytes.", minimum=1)
    keep: float = _option(86400.0, "For how long they wait.", key="keep_s", minimum=1)


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How a new version takes over while an older one serves. Rates are fractions of requests."""

    mode: str = _option(
        "direct",
        "direct: the new version takes over once it is warm. probation: it takes over, and the old one stays warm until the probation "
        "is passed. canary: it gets a part of the requests first. shadow: it gets copies of requests, and its answers are compared.",
        choices=("direct", "probation", "canary", "shadow"),
    )
    percent: float = _option(
        10.0, "Of the requests that name no version: those that a canary answers, or a shadow gets a copy of.", minimum=0
    )
    probation: float = _option(300.0, "How long a version is watched before it may be promoted.", key="probation_s", minimum=0)
    min_requests: int = _option(100, "Requests that it must have answered (a shadow: compared) as well.", minimum=1)
    promote: str = _option("auto", "When the probation is passed: auto promotes, manual waits for `headrace models promote`.",
        choices=("auto", "manual"),
    )  # fmt: skip
    max_error_rate: float = _option(0.01, "Rolled back when errors exceed the old version's rate by more.", minimum=0)
    max_latency_ratio: float = _option(
        1.5, "Rolled back when batches take longer than that times the old version's. 0: not watched.", minimum=0
    )
    max_nonfinite_rate: float = _option(
        0.0, "Rolled back when answers with NaN or infinity exceed the old version's rate by more.", minimum=0
    )
    max_disagreement: float = _option(
        0.0, "Shadow: rolled back when more of its answers than that differ from the old version's. 0: not watched.", minimum=0
    )
    max_drift: float = _option(
        0.0,
        "Rolled back when an output's distribution is further than that (PSI beyond chance) from the old version's in the same time, or, "
        "where they are counted into different ranges, from the reference published with the version. 0: not watched.",
        minimum=0,
    )
    max_accuracy_drop: float = _option(
        0.0,
        "Rolled back when its accuracy, estimated from confidence, is below the old version's by more; 0.02: two points. 0: not watched.",
        minimum=0,
    )
    tolerance: float = _option(
        0.05, "Shadow: outputs differ when they are off by more than that times 1 + |old|, or rank another class first.", minimum=0
    )

    def __post_init__(self) -> None:
        if self.percent > 100:
            raise ConfigError(f"[rollout] percent: expected at most 100, got {self.percent:g}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """model.toml, or what of a config.pbtxt it corresponds to. `provenance`: dotted key -> the file that set it."""

    name: str
    backend: str | None = _option(None, "Left out: chosen by the file found, model.onnx means onnxruntime.")
    filename: str | None = _option(None, "The artifact in a version directory; left out: the backend's default.")
    batching: BatchingConfig = BatchingConfig()
    instances: InstanceConfig = InstanceConfig()
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    preprocess: tuple[PreprocessConfig, ...] = ()
    postprocess: tuple[PostprocessConfig, ...] = ()
    version_policy: str = _option("latest:1", "latest:N | all | version numbers separated by commas.")
    labels: Mapping[str, int] = field(default_factory=dict)
    swap_policy: str = _option(
        "auto",
        "availability: the new version is loaded before the old one is unloaded; resource: the other way round; auto: resource where "
        "memory does not suffice for both.",
        choices=("auto", "availability", "resource"),
    )
    rollout: RolloutConfig = RolloutConfig()
    drift: DriftConfig = DriftConfig()
    capture: CaptureConfig = CaptureConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    warmup_runs: int = _option(3, "Rounds of runs before a version goes live, at every batch size that pays. 0: none.", minimum=0)
    signature_policy: str = _option(
        "off",
        "What a version without a valid signature of its manifest is: off: taken; warn: taken and logged; require: not loaded.",
        choices=("off", "warn", "require"),
    )
    signature_key: str = _option("", "PEM file beside model.toml with the public key (EC, P-256) that versions are signed with.")
    parameters: Mapping[str, str] = field(default_factory=dict, metadata={"doc": "Free key-value pairs, shown to clients in ModelConfig."})
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.signature_policy != "off" and not self.signature_key:
            raise ConfigError(f"{self.name}/model.toml: signature_policy '{self.signature_policy}': expected signature_key beside it")

    def serving_digest(self) -> str:
        """Equal for configurations under which a version is loaded and runs alike; how versions follow each other is not in it."""
        serving = dataclasses.replace(
            self, version_policy="", labels={}, swap_policy="auto", rollout=RolloutConfig(), notes=(), provenance={}
        )
        return hashlib.sha256(repr(serving).encode()).hexdigest()[:16]
