from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
from headrace import plugins
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import SourceConfig
from headrace.errors import ConfigError
from headrace.sources.directory import DirectorySource
from structlog.testing import CapturingLogger


def entry(name: str, target: str) -> EntryPoint:
    return EntryPoint(name, target, plugins.BACKENDS)


def test_one_broken_backend_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = EntryPoints(
        [
            entry("absent", "no_such_module_anywhere:Backend"),
            entry("function", "os.path:join"),
            entry("onnxruntime", "headrace.backends.onnxruntime:OnnxRuntimeBackend"),
        ]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: entries)
    log = CapturingLogger()
    monkeypatch.setattr(plugins, "log", log)

    assert plugins.load_backends() == {"onnxruntime": OnnxRuntimeBackend}

    errors = [(call.method_name, call.args[0], call.kwargs["plugin"]) for call in log.calls]
    assert errors == [("error", "plugin not importable", "absent"), ("error", "plugin not usable", "function")]


async def test_a_models_uri_opens_the_source_of_its_scheme() -> None:
    assert isinstance(plugins.open_source("some/folder", SourceConfig()), DirectorySource)
    assert isinstance(plugins.open_source("file://some/folder", SourceConfig()), DirectorySource)
    assert isinstance(plugins.open_source("folder:of models", SourceConfig()), DirectorySource)
    with pytest.raises(ConfigError, match=r"unknown scheme 'gopher'; expected a directory or one of .*file"):
        plugins.open_source("gopher://models", SourceConfig())
