"""Publishing into a local directory. A version is staged in <repository>/<model>/.staging-…, on the file system where it will be,
and gets its number by one rename: until then a reader sees nothing of it, from then on all of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.config import SourceConfig
from headrace.errors import ConfigError
from headrace.sources.base import Destination, is_version_name


class DirectoryDestination(Destination):
    """Owns nothing; whoever else publishes into the same directory is kept apart by the rename."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(uri, config)
        self._root = Path(uri.removeprefix("file://")).expanduser()
        if self._root.exists() and not self._root.is_dir():
            raise ConfigError(f"--to: expected a directory, {self._root} is a file")
        if self._root.is_dir() and any(is_version_name(child.name) and child.is_dir() for child in self._root.iterdir()):
            raise ConfigError(f"--to: expected a directory of models, {self._root} is a model itself: give the directory above it")

    @contextmanager
    def open_model(self, model: str) -> Iterator[Path]:
        directory = self._root / model
        made = [path for path in (self._root, directory) if not path.is_dir()]
        try:
            for path in made:
                path.mkdir()
                sync_directory(path.parent)
            yield directory
        finally:
            for path in reversed(made):
                try:
                    path.rmdir()
                except OSError:
                    break  # the usual case: the version is in it

    def numbers(self, model: str) -> list[int]:
        directory = self._root / model
        return sorted(int(child.name) for child in directory.iterdir() if is_version_name(child.name)) if directory.is_dir() else []

    def commit(self, model: str, version: int, staging: Path) -> str | None:
        directory = self._root / model
        _sync_tree(staging)
        target = directory / str(version)
        if not rename_to_free(staging, target):
            return None
        sync_directory(directory)
        return str(target)


def rename_to_free(staging: Path, target: Path) -> bool:
    """False if `target` exists. The rename itself refuses a directory with something in it; the look before it is for
    the rest, which it would replace: an empty directory, such as someone's who has just begun to copy by hand."""
    if os.path.lexists(target):
        return False
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _sync_tree(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
