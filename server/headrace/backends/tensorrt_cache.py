"""Engines that were built here, on this disk: one file each, named by the digest of everything that decided how it was built.

    <key>.plan      the plan; then a line of JSON that says what it is; then the length of that line and a magic number
    <key>.lock      held by flock while somebody builds it
    building-*      plans that are being written
    timings-*       TensorRT's measurements of kernels, which make the next build shorter

The description comes last so that the plan begins where the file does, which is mapped and not read. A plan is code to TensorRT: the
directory must belong to this user and be writable to nobody else, or it is not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.backends.tensorrt_options import BuildOptions
from headrace.backends.tensorrt_profiles import Profile
from headrace.errors import LoadError
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_MAGIC = b"HRPLAN01"
_TAIL = 8 + len(_MAGIC)
_RECIPE = 1
"""Counts changes of tensorrt_builder.py after which it makes other engines of the same key."""
_LARGEST_DESCRIPTION = 1 << 20
_CHUNK = 4 << 20
_LOCK_INTERVAL = 0.25
"""Seconds between tries for a lock that another process holds for minutes; flock itself cannot be called off."""
_ABANDONED = 24 * 3600.0
"""Seconds after which a file of a build that never ended is deleted: no build may take as long."""
_NOT_OF_THE_MODEL = ("manifest.json", "manifest.json.sig", "drift.msgpack")


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan depends on of the machine."""

    name: str
    compute_capability: str
    driver: int
    """The major version of CUDA that the driver has, which is what changes with the driver that TensorRT asks for."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that decides what a plan is. `model`: a digest of the model's files, or of its graph where the weights are apart."""

    model: str
    tensorrt: str
    device: Device
    profiles: tuple[Profile, ...]
    build: BuildOptions

    def describe(self) -> dict[str, Any]:
        """The same as plain values, equal where the keys are."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self), sort_keys=True))
        return {**described, "recipe": _RECIPE}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


def model_digest(path: Path) -> str:
    """Of an ONNX file and all files beside it, any of which may hold its weights. Reads them all: blocking.

    A file too much in the digest costs a build; one too few would serve another model's weights. Hence all but those known not to be.
    """
    digest = hashlib.sha256()
    others = (file for file in sorted(path.parent.rglob("*")) if file.is_file() and file != path)
    for file in (path, *(file for file in others if file.name not in _NOT_OF_THE_MODEL)):
        # The model's own name is none of its content.
        name = b"" if file == path else file.relative_to(path.parent).as_posix().encode()
        digest.update(len(name).to_bytes(8, "little") + name + file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as reader:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


class Plan:
    """A plan in the cache, mapped. `content` may be used until `close`."""

    def __init__(self, mapped: mmap.mmap, size: int) -> None:
        self._mapped = mapped
        self.content = memoryview(mapped)[:size]

    def close(self) -> None:
        self.content.release()
        self._mapped.close()


class PlanCache:
    """Owns nothing in memory; several threads and processes may work on the same directory. Every method blocks."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self._limit = limit

    def __repr__(self) -> str:
        return f"PlanCache({self.directory}, limit={self._limit})"

    def prepare(self) -> None:
        """Make the directory. Raises LoadError when it cannot be used, or others could put plans into it."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.stat()
        except OSError as error:
            reason = error.strerror
        else:
            if found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return
            reason = (
                f"expected a directory of user {os.geteuid()} that nobody else can write to, got user {found.st_uid}, "
                f"mode {stat.S_IMODE(found.st_mode):o}; plans run as code, so whoever can write there could run theirs"
            )
        raise LoadError(f"cache of engines {self.directory}: {reason}")

    def find(self, key: PlanKey) -> Plan | None:
        """The plan of exactly this key. One that is damaged or of another key is no plan; why is said, and it is built anew."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                plan = _open_plan(file.fileno(), key)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("cached engine not usable", file=str(path), reason=str(error), next="it is built again")
            path.unlink(missing_ok=True)
            return None
        return plan

    def discard(self, key: PlanKey, reason: str) -> None:
        """TensorRT would not have it after all."""
        log.warning("cached engine not usable", file=str(self._path(key)), reason=reason, next="it is built again")
        self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def building(self, key: PlanKey, cancelled: threading.Event) -> Iterator[None]:
        """The right to build this key, alone among all processes. Raises LoadError when `cancelled` while another one builds it."""
        path = self.directory / f"{key.digest}.lock"
        descriptor = _try_lock(path)
        if descriptor is None:
            log.info("engine is built elsewhere", key=key.digest[:16])
        while descriptor is None:
            if cancelled.wait(_LOCK_INTERVAL):
                raise LoadError("the load was given up while another instance built the engine")
            descriptor = _try_lock(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def new_file(self) -> Path:
        """For a plan that is being built, on the same file system."""
        descriptor, name = tempfile.mkstemp(prefix="building-", dir=self.directory)
        os.close(descriptor)
        return Path(name)

    def keep(self, key: PlanKey, built: Path) -> None:
        """Take in a plan that was built into a `new_file`, and make room for it. The latest stays, however large it is."""
        digest, size = hashlib.sha256(), built.stat().st_size
        with built.open("rb+") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            description = {"key": key.describe(), "sha256": digest.hexdigest(), "size": size}
            line = json.dumps(description, sort_keys=True).encode() + b"\n"
            file.write(line + len(line).to_bytes(8, "little") + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(built, self._path(key))
        self._make_room(self._path(key))

    def timings(self, key: PlanKey) -> Path:
        """TensorRT's measurements hold for one of its versions and one kind of device."""
        kind = hashlib.sha256(repr((key.tensorrt, key.device)).encode()).hexdigest()[:16]
        return self.directory / f"timings-{kind}"

    def _path(self, key: PlanKey) -> Path:
        return self.directory / f"{key.digest}.plan"

    def _make_room(self, latest: Path) -> None:
        for path in choose_evicted(_list_files(self.directory, time.time()), self._limit, latest):
            path.unlink(missing_ok=True)
            if path.suffix == ".plan":
                log.info("cached engine deleted", file=path.name, reason="the cache is full")


def choose_evicted(files: Sequence[tuple[Path, int, float]], limit: int, latest: Path) -> list[Path]:
    """Of (path, bytes, time of last use) those to delete, the longest unused first, so that the rest is within `limit`."""
    total = sum(size for _, size, _ in files)
    evicted = []
    for path, size, _ in sorted(files, key=lambda file: file[2]):
        if total <= limit:
            break
        if path != latest:
            evicted.append(path)
            total -= size
    return evicted


def _list_files(directory: Path, now: float) -> list[tuple[Path, int, float]]:
    """Plans and timings; what a build left that never ended is deleted on the way. Locks are empty, and go by themselves."""
    found = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.name.startswith("building-"):
                if now - status.st_mtime > _ABANDONED:
                    path.unlink()
            elif path.suffix != ".lock":
                found.append((path, status.st_size, status.st_mtime))
    return found


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock. Whoever held it deletes the file, so that what was locked may be there no more: then anew."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _open_plan(descriptor: int, key: PlanKey) -> Plan:
    """Raises ValueError with what is wrong with it."""
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    try:
        size = _check_plan(mapped, key)
    except BaseException:
        mapped.close()
        raise
    return Plan(mapped, size)


def _check_plan(mapped: mmap.mmap, key: PlanKey) -> int:
    if len(mapped) < _TAIL or mapped[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("not a whole file of this cache")
    length = int.from_bytes(mapped[-_TAIL : -len(_MAGIC)], "little")
    if length > min(_LARGEST_DESCRIPTION, len(mapped) - _TAIL):
        raise ValueError("its description is damaged")
    description: Mapping[str, Any] = json.loads(mapped[-_TAIL - length : -_TAIL])
    size = len(mapped) - _TAIL - length
    if not isinstance(description, dict) or description.get("key") != key.describe():
        raise ValueError("it was built for something else")
    with memoryview(mapped) as whole, whole[:size] as content:
        if description.get("size") != size or hashlib.sha256(content).hexdigest() != description.get("sha256"):
            raise ValueError("its content is not what was written")
    return size
