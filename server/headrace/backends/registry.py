"""Backends by name, through entry points, so that other packages can add theirs."""

from __future__ import annotations

from importlib.metadata import entry_points

from headrace.backends.base import Backend
from headrace.telemetry.log import get_logger

log = get_logger(__name__)
GROUP = "headrace.backends"


def load_backends() -> dict[str, type[Backend]]:
    """Every backend that imports; one that does not is logged and left out, so that it cannot stop the others."""
    backends: dict[str, type[Backend]] = {}
    for entry in entry_points(group=GROUP):
        try:
            found = entry.load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            log.error("backend not importable", backend=entry.name, reason=str(error))
            continue
        if isinstance(found, type) and issubclass(found, Backend):
            backends[entry.name] = found
        else:
            log.error("backend not usable", backend=entry.name, expected="a class that derives from Backend", got=repr(found))
    return backends
