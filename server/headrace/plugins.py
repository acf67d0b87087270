"""Backends and sources by name, through entry points, so that other packages can add theirs. Nothing else names an adapter."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from headrace.backends.base import Backend
from headrace.errors import ConfigError
from headrace.sources.base import Source
from headrace.telemetry.log import get_logger

log = get_logger(__name__)
BACKENDS = "headrace.backends"
SOURCES = "headrace.sources"

Plugin = TypeVar("Plugin")


def load_backends() -> dict[str, type[Backend]]:
    return load_plugins(BACKENDS, Backend)  # type: ignore[type-abstract]  # it is asked for subclasses


def open_source(uri: str) -> Source:
    """The source that a --models URI names by its scheme; a plain path is a directory. Raises ConfigError for an unknown scheme."""
    scheme, separator, _ = uri.partition("://")
    name = scheme if separator else "file"
    sources = load_plugins(SOURCES, Source)  # type: ignore[type-abstract]  # it is asked for subclasses
    if name not in sources:
        raise ConfigError(f"models: {uri!r}: unknown scheme '{name}'; expected a directory or one of {', '.join(sorted(sources))}")
    return sources[name](uri)


def load_plugins(group: str, base: type[Plugin]) -> dict[str, type[Plugin]]:
    """Every class of an entry-point group that imports; one that does not is logged and left out, so that it cannot stop the others."""
    plugins: dict[str, type[Plugin]] = {}
    for entry in entry_points(group=group):
        try:
            found = entry.load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            log.error("plugin not importable", group=group, plugin=entry.name, reason=str(error))
            continue
        if isinstance(found, type) and issubclass(found, base):
            plugins[entry.name] = found
        else:
            log.error(
                "plugin not usable", group=group, plugin=entry.name, expected=f"a class that derives from {base.__name__}", got=repr(found)
            )
    return plugins
