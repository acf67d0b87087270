"""Models in a local directory: DIR/<model>/<version>/model.onnx, or DIR/<version>/model.onnx for a single one."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from watchfiles import awatch

from headrace.config import SourceConfig
from headrace.errors import ConfigError, HeadraceError, LoadError
from headrace.lifecycle.policy import select_versions
from headrace.model_files import CONFIG_FILES, load_model_config, model_name
from headrace.sources.base import Fetched, Listing, ModelRef, Source, VersionRef, is_version_name
from headrace.sources.manifest import is_copied_whole
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

DEBOUNCE = 50
"""Milliseconds in which changes are taken for one. A publication is one rename; a longer wait would only delay it."""


class DirectorySource(Source):
    """Reads the file system in threads. Owns the watch on it, and which odd names it has already warned of."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(uri, config)
        self._root = Path(uri.removeprefix("file://")).expanduser()
        self._warned: set[Path] = set()
        self._changed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def list(self) -> Listing:
        return await asyncio.to_thread(self._list)

    async def fetch(self, model: ModelRef, version: int) -> Fetched:
        directory = Path(model.versions[version].location)
        try:
            await asyncio.to_thread(lambda: [path.stat() for path in _walk(directory)])
        except OSError as error:
            name = Path(error.filename or directory).name
            raise LoadError(f"{model.name}/{version} cannot be read: {error.strerror}: {name}") from None
        return Fetched(directory.parent, directory)

    async def wait_for_change(self) -> None:
        if self._watch is None:
            self._watch = asyncio.create_task(self._follow(), name=f"watch {self.uri}")
        await self._changed.wait()
        self._changed.clear()

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _follow(self) -> None:
        """Sees neither what other machines change on a network file system nor, always, Kubernetes' link flips: polls find those."""
        try:
            async for _ in awatch(self._root, watch_filter=None, debounce=DEBOUNCE, step=DEBOUNCE, recursive=True):
                self._changed.set()
        except Exception as error:  # no common base; too many watches, a root that was deleted
            log.warning("directory not watched", source=self.uri, reason=str(error), instead="polls")

    def _list(self) -> Listing:
        if not self._root.is_dir():
            found = "a file" if self._root.exists() else "nothing"
            raise ConfigError(f"model repository {self.uri!r}: expected a directory, found {found}")
        models: dict[str, ModelRef] = {}
        errors: dict[str, str] = {}
        for directory in self._model_directories():
            name = model_name(directory)
            try:
                models[name] = self._read_model(name, directory)
            except HeadraceError as error:
                errors[name] = str(error)
            except OSError as error:  # a dangling link, a file that is just being replaced, no permission: this model's matter
                errors[name] = f"model '{name}' cannot be read: {error.strerror}: {Path(error.filename or directory).name}"
        return Listing(models, errors)

    def _model_directories(self) -> Sequence[Path]:
        directories = sorted(child for child in self._root.iterdir() if child.is_dir() and not _is_hidden(child.name))
        for child in [child for child in directories if not _is_utf8(child.name)]:
            directories.remove(child)
            if child not in self._warned:
                self._warned.add(child)
                log.warning("directory ignored", directory=ascii(child.name), expected="a name in UTF-8, as the protocol's are")
        return [self._root] if any(is_version_name(child.name) for child in directories) else directories

    def _read_model(self, name: str, directory: Path) -> ModelRef:
        config = load_model_config(directory, name)
        select_versions((), config.version_policy)  # a policy that cannot be read is this model's error, not the server's
        children = [child for child in sorted(directory.iterdir()) if not _is_hidden(child.name)]
        # What a version is served with is in its token too. Of the configuration only what concerns serving: moving a label in
        # it must not load anything again.
        beside = [child for child in children if child.is_file() and child.name not in CONFIG_FILES]
        served_with = config.serving_digest()
        versions: dict[int, VersionRef] = {}
        for child in children:
            if child.is_dir() and is_version_name(child.name):
                versions[int(child.name)] = _read_version(child, beside, served_with)
            elif child.is_dir() and child not in self._warned and child.name not in ("configs", "warmup", "initial_state"):
                self._warned.add(child)
                log.warning("directory ignored", model=name, directory=child.name, expected="a version number without leading zeros")
        if not versions:
            raise ConfigError(f"model '{name}' has no version: expected a directory such as {name}/1 with a model file in it")
        return ModelRef(name, config, versions)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_hidden(name: str) -> bool:
    """Dot and underscore names are staging areas, Kubernetes' ..data, caches: never a model and never a version."""
    return name.startswith((".", "_"))


def _read_version(directory: Path, beside: Sequence[Path], served_with: str) -> VersionRef:
    """The token changes when a file is added, removed, replaced or rewritten, those beside the versions included.

    Reads no content but a manifest's. Links are followed, so that Kubernetes' swap of ..data shows as another inode.
    """
    try:
        token = _token(directory, beside, served_with)
    except OSError as error:
        # A dangling link, a file that is just being replaced, no permission: this version's matter, which fails with it when it is
        # fetched; those beside it are not held up.
        return VersionRef(f"unreadable-{error.errno}", str(directory), is_complete=False)
    return VersionRef(token, str(directory), is_copied_whole(directory))


def _token(directory: Path, beside: Sequence[Path], served_with: str) -> str:
    digest = hashlib.sha256(served_with.encode())
    for path in [*beside, *_walk(directory)]:
        stat = path.stat()
        name = os.fsencode(path.relative_to(directory.parent))
        digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode())
    return digest.hexdigest()[:16]


def _walk(directory: Path) -> Iterator[Path]:
    """Itself and everything below. Raises OSError where it cannot look, which Path.rglob passes over."""
    yield directory
    for folder, names, files in os.walk(directory, onerror=_raise):
        names.sort()
        for name in sorted([*names, *files]):
            yield Path(folder) / name


def _raise(error: OSError) -> None:
    raise error
