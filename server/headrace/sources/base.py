"""Where versions come from. A source says everything it wants served each time it is asked; it keeps no history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VersionRef:
    """One version that a source offers. `token` changes when the content does; equal tokens mean nothing needs doing."""

    directory: Path
    token: str


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that a source offers. `directory` holds model.toml or config.pbtxt, if there is one."""

    name: str
    directory: Path
    versions: Mapping[int, VersionRef]
    version_policy: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything a source has now. `errors`: model -> why it cannot be offered."""

    models: Mapping[str, ModelRef]
    errors: Mapping[str, str]


def is_version_name(name: str) -> bool:
    return name.isascii() and name.isdigit() and (name == "0" or not name.startswith("0"))


class Source(ABC):
    """Raises ConfigError or OSError from `list` when it cannot say what it has, which never unloads anything."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    async def list(self) -> Listing:
        """The complete present offer. Never blocks the event loop."""

    async def close(self) -> None:  # noqa: B027  # most sources hold nothing
        """Give connections and watches back."""
