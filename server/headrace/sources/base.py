"""Where versions come from, and where they are published to.

A source says everything it wants served each time it is asked; it keeps no history. Leaving a version out means that it is no
longer wanted. A destination takes what `headrace publish` has staged, whole or not at all.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.config import ModelConfig, SourceConfig


@dataclass(frozen=True, slots=True)
class VersionRef:
    """One version that a source offers.

    `token` changes when the content does; equal tokens mean that nothing needs doing. `location` is for people. `is_complete` is
    False where only time can tell: files without a manifest that somebody may still be copying. Such a version is taken once its
    token has been the same for a while.
    """

    token: str
    location: str
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that a source offers. `labels`: those that the source itself gives (a registry's aliases), version by label."""

    name: str
    config: ModelConfig
    versions: Mapping[int, VersionRef]
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything a source has now. `errors`: model -> why it cannot be offered; its versions stay as they are."""

    models: Mapping[str, ModelRef]
    errors: Mapping[str, str] = field(default_factory=dict)


def _nothing_to_release() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Fetched:
    """A version in local directories, which stay until `release` is called. `model_directory` holds the files that model.toml
    names (labels, keys); it may be the version's parent or a place of its own."""

    model_directory: Path
    version_directory: Path
    release: Callable[[], None] = _nothing_to_release


def is_version_name(name: str) -> bool:
    """A whole number without leading zeros that fits the protocol's int64."""
    return name.isascii() and name.isdigit() and (name == "0" or not name.startswith("0")) and len(name) <= 19 and int(name) < 2**63


class Source(ABC):
    """Raises ConfigError for what only a changed configuration mends, OSError for a place that cannot be read now.

    Neither ever unloads anything. Built on the event loop; blocking work goes to threads.
    """

    def __init__(self, uri: str, config: SourceConfig) -> None:
        self.uri = uri
        self.config = config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri})"

    @abstractmethod
    async def list(self) -> Listing:
        """The complete present offer."""

    @abstractmethod
    async def fetch(self, model: ModelRef, version: int) -> Fetched:
        """Bring one version of the latest offer here. Raises LoadError with the reason; a cancelled fetch leaves nothing behind."""

    async def wait_for_change(self) -> None:
        """Return when `list` may say something new. A hint: it may come for nothing, and may be missed. Here it never comes."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:  # noqa: B027  # most sources hold nothing
        """Give connections and watches back."""


class Destination(ABC):
    """One repository that versions are published to. Blocking; used by the command line only.

    Raises ConfigError for a place that cannot be one, OSError for one that cannot be written now.
    """

    def __init__(self, uri: str, config: SourceConfig) -> None:
        self.uri = uri
        self.config = config

    @abstractmethod
    def open_model(self, model: str) -> AbstractContextManager[Path]:
        """A local directory with what lies beside the model's versions (model.toml, labels); the staging directory is made in it.

        Whatever happens inside the block, nothing but committed versions is left when it ends.
        """

    @abstractmethod
    def numbers(self, model: str) -> list[int]:
        """The versions that are there, ascending."""

    @abstractmethod
    def commit(self, model: str, version: int, staging: Path) -> str | None:
        """Make the staged files version `version`, all at once. The location as people read it; None when the number is taken."""


__all__ = ["Destination", "Fetched", "Listing", "ModelRef", "Source", "VersionRef", "is_version_name"]
