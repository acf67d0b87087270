"""The layers of docs/architecture.md, held by reading every module's imports. Imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "server"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("headrace.errors",),
    ("headrace.requests", "headrace.telemetry.trace_context"),
    (
        "headrace.shared_memory",
        "headrace.cuda_runtime",
        "headrace.cuda_regions",
        "headrace.client_memory",
        "headrace.signature",
        "headrace.telemetry.log",
        "headrace.telemetry.access_log",
        "headrace.threads",
    ),
    ("headrace.config", "headrace.backends.processing"),
    (
        "headrace.config_loading",
        "headrace.wire",
        "headrace.telemetry.counters",
        "headrace.telemetry.exemplars",
        "headrace.telemetry.tracing",
        "headrace.telemetry.records",
    ),
    (
        "headrace.batching.batch_queue",
        "headrace.batching.assemble",
        "headrace.batching.latency",
        "headrace.batching.forecast",
        "headrace.batching.lateness",
        "headrace.batching.screening",
        "headrace.batching.observer",
        "headrace.lifecycle.state",
        "headrace.lifecycle.policy",
        "headrace.lifecycle.rollout",
        "headrace.drift",
        "headrace.capture",
        "headrace.feedback",
    ),
    (
        "headrace.lifecycle.answers",
        "headrace.lifecycle.events",
        "headrace.lifecycle.memory",
        "headrace.lifecycle.tasks",
        "headrace.lifecycle.labels",
        "headrace.lifecycle.dry_run",
        "headrace.backends.base",
        "headrace.model_files",
        "headrace.sources.base",
        "headrace.sources.manifest",
        "headrace.sources.signing",
    ),
    (
        "headrace.sources.verification",
        "headrace.backends.onnx_graph",
        "headrace.backends.processed",
        "headrace.lifecycle.processing",
        "headrace.backends.cuda",
        "headrace.backends.cuda_lanes",
        "headrace.backends.cuda_processing",
        "headrace.backends.onnxruntime_session",
        "headrace.backends.onnxruntime_options",
        "headrace.backends.onnxruntime_providers",
        "headrace.backends.onnxruntime_runs",
        "headrace.backends.tensorrt_api",
        "headrace.backends.tensorrt_profiles",
        "headrace.backends.tensorrt_options",
        "headrace.backends.tensorrt_cache",
        "headrace.backends.tensorrt_build",
        "headrace.backends.tensorrt_builder",
        "headrace.backends.tensorrt_engine",
        "headrace.backends.tensorrt_refit",
        "headrace.backends.tensorrt_plans",
        "headrace.backends.tensorrt_wiring",
        "headrace.backends.tensorrt_fit",
    ),
    (
        "headrace.sources.cache",
        "headrace.sources.mlflow_registry",
        "headrace.sources.object_store_index",
        "headrace.sources.object_store_client",
    ),
    (
        "headrace.backends.onnxruntime",
        "headrace.backends.onnxruntime_cuda",
        "headrace.backends.tensorrt",
        "headrace.plugins",
        "headrace.sources.directory",
        "headrace.sources.directory_destination",
        "headrace.sources.object_store",
        "headrace.sources.object_store_destination",
        "headrace.sources.mlflow",
        "headrace.sources.mlflow_destination",
        "headrace.lifecycle.effective",
    ),
    (
        "headrace.lifecycle.view",
        "headrace.lifecycle.placement",
        "headrace.lifecycle.devices",
        "headrace.batching.device_inputs",
        "headrace.lifecycle.admission",
        "headrace.lifecycle.value_checks",
        "headrace.batching.batcher",
        "headrace.batching.event_loop",
        "headrace.lifecycle.attachments",
        "headrace.capture.captures",
        "headrace.feedback.feedbacks",
        "headrace.drift.monitor",
        "headrace.drift.watch",
        "headrace.sources.publish",
    ),
    (
        "headrace.backends.pipeline",
        "headrace.backends.runner",
        "headrace.backends.worker",
        "headrace.lifecycle.recorded",
        "headrace.lifecycle.drift_subject",
        "headrace.lifecycle.inspection",
        "headrace.lifecycle.instances",
        "headrace.lifecycle.wanted",
        "headrace.lifecycle.parts",
        "headrace.lifecycle.warm_up",
        "headrace.lifecycle.version",
        "headrace.lifecycle.routes",
        "headrace.lifecycle.shadow",
        "headrace.lifecycle.trial",
        "headrace.lifecycle.model",
        "headrace.lifecycle.manager",
        "headrace.lifecycle.watcher",
        "headrace.lifecycle.control",
        "headrace.lifecycle.admin",
    ),
    ("headrace.telemetry", "headrace.rpc", "headrace.http", "headrace.bench", "headrace.replay", "headrace.profiling"),
    ("headrace.app",),
    (
        "headrace.testing",
        "headrace.cli",
        "headrace.cli_bench",
        "headrace.cli_drift",
        "headrace.cli_drift_tables",
        "headrace.cli_local",
        "headrace.cli_models",
        "headrace.cli_replay",
        "headrace.cli_feedback",
        "headrace.cli_health",
        "headrace.cli_tables",
    ),
)
"""Lowest first. A module belongs to the longest name that it starts with; modules of one layer may import each other."""

PURE = (
    "headrace.backends.tensorrt_profiles",
    "headrace.backends.tensorrt_options",
    "headrace.telemetry.trace_context", "headrace.telemetry.exemplars",
    "headrace.errors", "headrace.requests", "headrace.signature", "headrace.config", "headrace.batching.batch_queue",
    "headrace.batching.assemble", "headrace.batching.latency", "headrace.batching.forecast", "headrace.lifecycle.state",
    "headrace.batching.device_inputs", "headrace.batching.lateness",
    "headrace.lifecycle.policy", "headrace.lifecycle.placement", "headrace.lifecycle.rollout", "headrace.bench.choice", "headrace.wire",
    "headrace.drift.features", "headrace.drift.reference", "headrace.drift.counting", "headrace.drift.verdict", "headrace.drift.plan",
    "headrace.drift.extraction", "headrace.drift.calibration", "headrace.drift.building", "headrace.drift.distributions",
    "headrace.drift.statistics", "headrace.drift.judgement", "headrace.drift.sequential", "headrace.drift.reference_file",
    "headrace.capture.records", "headrace.capture.sampling", "headrace.replay.comparison", "headrace.replay.messages",
    "headrace.drift.window", "headrace.drift.alarms", "headrace.drift.joining", "headrace.drift.sampling",
    "headrace.lifecycle.processing", "headrace.backends.processing",
    "headrace.drift.ranking", "headrace.drift.page", "headrace.http.dashboard.state", "headrace.http.dashboard.drift",
    "headrace.http.dashboard.numbers", "headrace.profiling.rows",
)  # fmt: skip
IMPURE = {"asyncio", "threading", "time", "grpc", "prometheus_client"}
ADAPTERS = (
    "headrace.backends.tensorrt",
    "headrace.backends.onnxruntime",
    "headrace.backends.onnxruntime_cuda",
    "headrace.sources.directory",
    "headrace.sources.directory_destination",
    "headrace.sources.object_store",
    "headrace.sources.object_store_destination",
    "headrace.sources.mlflow",
    "headrace.sources.mlflow_destination",
)
"""Each is a runtime or a kind of place. Two of the same one (its source and destination, its CPU and GPU) may import each other."""


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Also those inside functions and for type checkers: a dependency is one wherever it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int | None:
    found = [(len(name), level) for level, names in enumerate(LAYERS) for name in names if module == name or module.startswith(name + ".")]
    return max(found)[1] if found else None


def belongs(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def place_of(module: str) -> str:
    return next(name for name in ADAPTERS if belongs(module, (name,))).removesuffix("_destination").removesuffix("_cuda")


def violations(module: str, source: str) -> list[str]:
    found = []
    level = layer_of(module)
    for imported in imports_of(ast.parse(source)):
        root = imported.partition(".")[0]
        target = layer_of(imported)
        if level is not None and target is not None and target > level:
            found.append(f"{module} imports {imported}, which is above it")
        if belongs(module, PURE) and root in IMPURE:
            found.append(f"{module} is pure and imports {root}")
        if root in ("grpc", "grpc_reflection") and not module.startswith("headrace.rpc"):
            found.append(f"{module} imports {root}, which only headrace.rpc may")
        if root == "opentelemetry" and module != "headrace.telemetry.otel":
            found.append(f"{module} imports {root}, which only headrace.telemetry.otel may")
        if belongs(imported, ADAPTERS) and not belongs(module, ADAPTERS):
            found.append(f"{module} names the adapter {imported}, which only entry points may")
        if belongs(module, ADAPTERS) and belongs(imported, ADAPTERS) and place_of(module) != place_of(imported):
            found.append(f"the adapter {module} imports the adapter {imported}")
    return found


MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(SOURCE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    path = MODULES[module]
    assert layer_of(module) is not None or path.name == "__init__.py", f"{module} is in no layer: say in LAYERS where it belongs"
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "text"),
    [
        ("headrace.errors", "from headrace.app import Server", "above"),
        ("headrace.batching.batch_queue", "import threading", "pure"),
        ("headrace.batching.batch_queue", "def now():\n    import time\n    return time.monotonic()", "pure"),
        ("headrace.config", "if TYPE_CHECKING:\n    from headrace.lifecycle.manager import ModelManager", "above"),
        ("headrace.wire.codec", "import asyncio", "pure"),
        ("headrace.lifecycle.manager", "import grpc", "only headrace.rpc"),
        ("headrace.telemetry.tracing", "def export():\n    from opentelemetry import trace", "only headrace.telemetry.otel"),
        ("headrace.lifecycle.version", "from headrace.backends.onnxruntime import OnnxRuntimeBackend", "only entry points"),
        ("headrace.sources.directory", "from headrace.backends.onnxruntime import OnnxRuntimeBackend", "the adapter"),
    ],
)
def test_the_check_finds_what_it_is_for(module: str, source: str, text: str) -> None:
    assert any(text in violation for violation in violations(module, source))


@pytest.mark.parametrize("source", ["import headrace.errors", "from headrace import errors", "import numpy as np, math"])
def test_the_check_lets_pass_what_is_below_or_elsewhere(source: str) -> None:
    assert violations("headrace.batching.assemble", source) == []
