"""Models in a local directory: DIR/<model>/<version>/model.onnx, or DIR/<version>/model.onnx for a single one."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from headrace.errors import ConfigError, HeadraceError
from headrace.lifecycle.policy import select_versions
from headrace.model_files import load_model_config, model_name
from headrace.sources.base import Listing, ModelRef, Source, VersionRef, is_version_name
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


class DirectorySource(Source):
    """Reads the file system in a thread, and keeps nothing but which odd names it has already warned of."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._root = Path(uri.removeprefix("file://")).expanduser()
        self._warned: set[Path] = set()

    async def list(self) -> Listing:
        return await asyncio.to_thread(self._list)

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
        return [self._root] if any(is_version_name(child.name) for child in directories) else directories

    def _read_model(self, name: str, directory: Path) -> ModelRef:
        config = load_model_config(directory, name)
        select_versions((), config.version_policy)  # a policy that cannot be read is this model's error, not the server's
        beside = [child for child in directory.iterdir() if child.is_file() and not _is_hidden(child.name)]
        versions: dict[int, VersionRef] = {}
        for child in sorted(directory.iterdir()):
            if _is_hidden(child.name) or not child.is_dir():
                continue
            if is_version_name(child.name):
                versions[int(child.name)] = VersionRef(child, _token(directory, [*beside, *child.rglob("*")]))
            elif child not in self._warned and child.name not in ("configs", "warmup", "initial_state"):
                self._warned.add(child)
                log.warning("directory ignored", model=name, directory=child.name, expected="a version number without leading zeros")
        if not versions:
            raise ConfigError(f"model '{name}' has no version: expected a directory such as {name}/1 with a model file in it")
        return ModelRef(name, directory, versions, config.version_policy)


def _is_hidden(name: str) -> bool:
    """Dot and underscore names are staging areas, Kubernetes' ..data, caches: never a model and never a version."""
    return name.startswith((".", "_"))


def _token(directory: Path, paths: Iterable[Path]) -> str:
    """Changes when a file is added, removed, replaced or rewritten, those beside the versions (configuration, labels) included.

    Reads no content. Links are followed, so that Kubernetes' swap of ..data shows as another inode.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        name = os.fsencode(path.relative_to(directory))
        digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode())
    return digest.hexdigest()[:16]
