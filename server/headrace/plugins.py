"""Backends and sources by name, through entry points, so that other packages can add theirs. Nothing else names an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from headrace.backends.base import Backend
from headrace.config import SourceConfig
from headrace.errors import ConfigError
from headrace.sources.base import Destination, Source
from headrace.telemetry.log import get_logger

log = get_logger(__name__)
BACKENDS = "headrace.backends"
SOURCES = "headrace.sources"
DESTINATIONS = "headrace.destinations"

Plugin = TypeVar("Plugin")


def load_backends() -> dict[str, type[Backend]]:
    return load_plugins(BACKENDS, Backend)  # type: ignore[type-abstract]  # it is asked for subclasses


def open_source(uri: str, config: SourceConfig) -> Source:
    """The source that a --models URI names by its scheme; a plain path is a directory. Raises ConfigError for an unknown scheme."""
    sources = load_plugins(SOURCES, Source)  # type: ignore[type-abstract]  # it is asked for subclasses
    return sources[_scheme("models", uri, sources)](uri, config)


def open_destination(uri: str, config: SourceConfig) -> Destination:
    """Where --to points, likewise. Raises ConfigError also for a source that cannot be published to."""
    destinations = load_plugins(DESTINATIONS, Destination)  # type: ignore[type-abstract]  # it is asked for subclasses
    return destinations[_scheme("--to", uri, destinations)](uri, config)


def _scheme(option: str, uri: str, known: Mapping[str, object]) -> str:
    """`s3://…` and `mlflow:…` are told from paths with a colon by what is known; `://` is never a path."""
    scheme, separator, rest = uri.partition(":")
    if not separator or (scheme not in known and not rest.startswith("//")):
        return "file"
    if scheme not in known:
        raise ConfigError(f"{option}: {uri!r}: unknown scheme '{scheme}'; expected a directory or one of {', '.join(sorted(known))}")
    return scheme


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
