from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from headrace.config import BatchingConfig, InstanceConfig, ModelConfig, ServerConfig, TensorConfig
from headrace.config_loading import load_model_toml, load_server_config, option_keys, parse_model_toml
from headrace.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- the server --------------------------------------------------------------------------------------------------------


def test_nothing_given_means_the_defaults_which_bind_to_loopback_only() -> None:
    config = load_server_config({}, {}, None)
    assert config == ServerConfig()
    assert [listener.rpartition(":")[0] for listener in (*config.grpc, config.http)] == ["127.0.0.1", "127.0.0.1"]


def test_environment_overrides_the_file_and_flags_override_both(tmp_path: Path) -> None:
    file = write(tmp_path / "headrace.toml", 'server_name = "file"\nlog_level = "error"\nload_threads = 3\n')
    environment = {"HEADRACE_SERVER_NAME": "environment", "HEADRACE_LOG_LEVEL": "warning", "PATH": "/bin"}
    config = load_server_config({"server_name": "flag"}, environment, file)
    assert (config.server_name, config.log_level, config.load_threads) == ("flag", "warning", 3)


@pytest.mark.parametrize("key", option_keys(ServerConfig))
def test_every_option_can_be_set_from_the_environment(key: str) -> None:
    field = option_keys(ServerConfig)[key]
    texts = {"grpc": "unix:/run/a.sock", "http": "0.0.0.0:1", "tls_certificate": "a.pem", "drift_webhooks": "https://a/b"}
    numbers = {"max_message_bytes": "4096", "max_inflight_bytes": "8192", "load_threads": "7", "cache_bytes": "1000", "shared_threads": "3"}
    seconds = {"shutdown_grace_s": "2.5", "poll_interval_s": "2.5", "settle_s": "2.5"}
    texts |= {"tracing": "console"}
    numbers |= {"trace_fraction": "0.5", "trace_max_per_second": "2.5"}
    numbers |= {"capture_fraction": "0.5", "capture_max_bytes": "8388608", "capture_max_per_second": "2.5"}
    choices = field.metadata["choices"]
    text = {**texts, **numbers, **seconds}.get(key) or (choices[-1] if choices else "true" if field.type == "bool" else "x")
    environment = {f"HEADRACE_{key.upper()}": text}
    if key.startswith("tls_"):
        environment |= {"HEADRACE_TLS_CERTIFICATE": text, "HEADRACE_TLS_KEY": text}
    value = getattr(load_server_config({}, environment, None), field.name)
    expected = {"grpc": ("unix:/run/a.sock",), "models": ("x",), "load_models": ("x",), "drift_webhooks": ("https://a/b",)}
    assert value == expected.get(key, True if type(value) is bool else type(value)(text))


def test_capture_and_feedback_of_a_model() -> None:
    toml = b'[capture]\nenabled = false\nredact = ["a", "b"]\n[feedback]\nenabled = true\nkeep_s = 60\nkind = "regression"\n'
    config = parse_model_toml(toml, "m")
    assert (config.capture.enabled, config.capture.redact) == (False, ("a", "b"))
    assert (config.feedback.enabled, config.feedback.keep, config.feedback.kind) == (True, 60.0, "regression")
    with pytest.raises(ConfigError, match=r"m/model.toml \[capture\]: unknown key 'redacted', did you mean 'redact'"):
        parse_model_toml(b'[capture]\nredacted = ["a"]\n', "m")
    with pytest.raises(ConfigError, match=r"capture_fraction: expected 0 to 1, got 2\.0"):
        load_server_config({"capture_fraction": "2"}, {}, None)


def test_a_secret_comes_from_the_environment_alone_and_is_not_shown(tmp_path: Path) -> None:
    config = load_server_config({}, {"HEADRACE_WEBHOOK_SECRET": "xyzzy"}, None)
    assert config.webhook_secret == "xyzzy"
    assert "xyzzy" not in repr(config)
    (tmp_path / "headrace.toml").write_text('webhook_secret = "xyzzy"\n')
    with pytest.raises(ConfigError, match="a secret; expected it in the environment, as HEADRACE_WEBHOOK_SECRET") as caught:
        load_server_config({}, {}, tmp_path / "headrace.toml")
    assert "xyzzy" not in str(caught.value)


def test_lists_are_separated_by_commas_in_the_environment_and_repeated_as_flags() -> None:
    assert load_server_config({}, {"HEADRACE_MODELS": "a, b,"}, None).models == ("a", "b")
    assert load_server_config({"models": ["a", "b,c"]}, {}, None).models == ("a", "b,c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grcp = []", "unknown key 'grcp', did you mean 'grpc'?"),
        ("zzz = 1", "unknown key 'zzz'; known: models, grpc,"),
        ('grpc = "127.0.0.1:1"', "grpc: expected a list of str, got '127.0.0.1:1'"),
        ("load_threads = true", "load_threads: expected an int, got True"),
        ("load_threads = 0", "load_threads: expected at least 1, got 0"),
        ("shutdown_grace_s = nan", "shutdown_grace_s: expected a finite number, got nan"),
        ('log_format = "xml"', "log_format: expected one of auto, console, json, got 'xml'"),
        ("access_log = 1", "access_log: expected a bool, got 1"),
        ("= 1", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "headrace.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_server_config({}, {}, file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("HEADRACE_LOGLEVEL", "info", "unknown variable HEADRACE_LOGLEVEL, did you mean 'HEADRACE_LOG_LEVEL'?"),
        ("HEADRACE_ACCESS_LOG", "maybe", "HEADRACE_ACCESS_LOG: expected true or false, got 'maybe'"),
        ("HEADRACE_LOAD_THREADS", "two", "HEADRACE_LOAD_THREADS: expected an int, got 'two'"),
        ("HEADRACE_SHUTDOWN_GRACE_S", "-1", "HEADRACE_SHUTDOWN_GRACE_S: expected at least 0, got -1.0"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_server_config({}, {variable: text}, None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "variable", ["HEADRACE_SERVICE_HOST", "HEADRACE_SERVICE_PORT_GRPC", "HEADRACE_PORT", "HEADRACE_PORT_8001_TCP_ADDR"]
)
def test_variables_that_kubernetes_makes_of_a_service_named_headrace_are_not_ours(variable: str) -> None:
    assert load_server_config({}, {variable: "tcp://10.0.0.1:8001"}, None) == ServerConfig()


@pytest.mark.parametrize("listener", ["8001", ":8001", "host:", "host:65536", "host:http", "unix:", ""])
def test_a_grpc_listener_that_cannot_be_bound_is_refused(listener: str) -> None:
    with pytest.raises(ConfigError, match="grpc: expected"):
        ServerConfig(grpc=(listener,))


@pytest.mark.parametrize(
    "options", [{"tls_certificate": "c.pem"}, {"tls_key": "k.pem"}, {"tls_client_ca": "ca.pem"}, {"http": "unix:/run/http"}]
)
def test_options_that_make_no_sense_together_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ServerConfig(**options)


# -- a model -----------------------------------------------------------------------------------------------------------

WHOLE = """
backend = "onnxruntime"
filename = "net.onnx"
max_batch_size = 16
max_queue_delay_ms = 1.5
max_queue_size = 100
allowed_batch_sizes = [4, 16]
priority_levels = 3
default_priority_level = 2
default_timeout_ms = 250
allow_timeout_override = false
version_policy = "1,3"
warmup_runs = 0

[instances]
count = 2
device = "cpu"
threads = 1
[instances.options]
"session.intra_op.allow_spinning" = 1

[[input]]
name = "x"
datatype = "FP32"
shape = [3, -1]
optional = true

[[output]]
name = "y"
labels = "labels.txt"

[parameters]
team = "vision"
public = true
"""


def test_every_key_of_model_toml_arrives_in_seconds_and_rows(tmp_path: Path) -> None:
    config = load_model_toml(write(tmp_path / "model.toml", WHOLE), "net")
    batching = BatchingConfig(16, pytest.approx(0.0015), 100, (4, 16), 3, 2, pytest.approx(0.25), allow_timeout_override=False)
    assert (config.name, config.backend, config.filename, config.batching) == ("net", "onnxruntime", "net.onnx", batching)
    assert config.instances == InstanceConfig(2, "cpu", 1, {"session.intra_op.allow_spinning": "1"})
    assert config.inputs == (TensorConfig("x", "FP32", (3, -1), optional=True),)
    assert config.outputs == (TensorConfig("y", labels="labels.txt"),)
    assert (config.version_policy, config.warmup_runs) == ("1,3", 0)
    assert config.parameters == {"team": "vision", "public": "true"}


def test_the_origin_is_kept_of_what_model_toml_sets_and_of_nothing_else(tmp_path: Path) -> None:
    config = load_model_toml(write(tmp_path / "model.toml", "max_batch_size = 4\n[instances]\ncount = 2\n"), "net")
    assert set(config.provenance.values()) == {"model.toml"}
    assert "max_batch_size" in config.provenance
    assert "max_queue_size" not in config.provenance


def test_an_empty_model_toml_changes_nothing(tmp_path: Path) -> None:
    assert load_model_toml(write(tmp_path / "model.toml", ""), "net") == ModelConfig("net")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batchsize = 4", "net/model.toml: unknown key 'max_batchsize', did you mean 'max_batch_size'?"),
        ("max_queue_delay = 1", "net/model.toml: unknown key 'max_queue_delay', did you mean 'max_queue_delay_ms'?"),
        ("max_queue_delay_ms = inf", "net/model.toml: max_queue_delay_ms: expected a finite number, got inf"),
        ("max_batch_size = -1", "net/model.toml: max_batch_size: expected at least 0, got -1"),
        ("max_batch_size = 4.0", "net/model.toml: max_batch_size: expected an int, got 4.0"),
        ("allowed_batch_sizes = [0]", "net/model.toml: allowed_batch_sizes: expected at least 1, got 0"),
        ("priority_levels = 1\ndefault_priority_level = 2", "net/model.toml: default_priority_level: expected at most"),
        ("instances = 2", "net/model.toml: instances: expected a table [instances], got 2"),
        ("[instances]\ncounts = 2", "net/model.toml [instances]: unknown key 'counts', did you mean 'count'?"),
        ('[instances]\ndevice = "gpu"', "net/model.toml [instances]: device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("[input]\nname = 'x'", "net/model.toml: input: expected tables [[input]], got"),
        ("[[input]]\nshape = [1]", "net/model.toml [[input]]: expected a 'name'"),
        ("[[output]]\nname = 'y'\nlabel = 'l.txt'", "net/model.toml [[output]]: unknown key 'label', did you mean 'labels'?"),
        ("[parameters]\na = [1]", "net/model.toml: parameters: expected a table of plain values"),
    ],
)
def test_a_mistake_in_model_toml_names_the_model_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model_toml(write(tmp_path / "model.toml", text), "net")
    assert message in str(caught.value)


def test_docs_configuration_md_is_what_the_declarations_say() -> None:
    check = subprocess.run([sys.executable, ROOT / "scripts" / "config_docs.py", "--check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
