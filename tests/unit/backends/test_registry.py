from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
from headrace.backends import registry
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from structlog.testing import CapturingLogger


def entry(name: str, target: str) -> EntryPoint:
    return EntryPoint(name, target, registry.GROUP)


def test_one_broken_backend_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = EntryPoints(
        [
            entry("absent", "no_such_module_anywhere:Backend"),
            entry("function", "os.path:join"),
            entry("onnxruntime", "headrace.backends.onnxruntime:OnnxRuntimeBackend"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda *, group: entries)
    log = CapturingLogger()
    monkeypatch.setattr(registry, "log", log)

    assert registry.load_backends() == {"onnxruntime": OnnxRuntimeBackend}

    errors = [(call.method_name, call.args[0], call.kwargs["backend"]) for call in log.calls]
    assert errors == [("error", "backend not importable", "absent"), ("error", "backend not usable", "function")]
