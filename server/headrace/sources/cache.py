"""Versions from elsewhere, on this machine's disk: every file once, named by its sha256, and never more than was asked for.

    blobs/<sha256>                                 files, complete and durable
    sessions/<token>/lock                          held by flock for as long as the process lives
    sessions/<token>/incoming/<token>              a file that is still arriving
    sessions/<token>/versions/<token>/<model>/     a version in use: <version>/ and what lies beside it, hard links to blobs

Servers share a cache. What one of them is doing lies in its own session, and blobs appear and vanish by link, rename and unlink
alone, so that no lock is needed for them. Locks say two things: `sessions/<token>/lock` that the session's owner lives, and
`lock`, held for moments, that nobody else is making a session, clearing dead ones away, or deleting blobs.

A blob is in use while it has a second link, whoever made it: that is what keeps it from being deleted. Where a file system has no
hard links a version is a copy, which no deleted blob takes away.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from headrace.config import SourceConfig
from headrace.errors import LoadError
from headrace.sources.base import Fetched
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient

log = get_logger(__name__)

FILES_AT_ONCE = 4
"""Of all versions together: enough to fill a line with small files, few enough that large ones do not starve each other."""
HASHED_AT_ONCE = 8 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
LINKLESS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file of a version. `path` is relative, with `/`. `open` begins its download; what it raises as OSError fails the fetch.

    `sha256` and `size` are checked where they are known. `key` names the content where its digest is not known (an address and an
    etag, say): the same key is not downloaded twice by one process.
    """

    path: str
    open: Callable[[], AsyncGenerator[bytes, None]]
    size: int | None = None
    sha256: str = ""
    key: str = ""


class VersionCache:
    """Owns one session of the cache, with the versions that are in use, and which digests belong to which keys.

    Event loop only, but for `Fetched.release`, which may come from any thread. Nothing is touched before the first fetch.
    """

    def __init__(self, config: SourceConfig) -> None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "headrace" / "models"
        self._disk = _Disk(Path(config.cache_directory or default).expanduser(), config.cache_bytes)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="headrace-cache", initializer=be_patient)
        self._downloads = asyncio.Semaphore(FILES_AT_ONCE)
        self._digests: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"VersionCache({self._disk.root}, {self._disk.in_use} versions in use)"

    async def fetch(self, model: str, version: int, files: Sequence[WantedFile], beside: Sequence[WantedFile] = ()) -> Fetched:
        """A directory with the version's `files` and with those `beside` its versions. Raises LoadError. Whatever it raises, of
        the attempt only files that arrived whole are left, and those the next attempt does not download again."""
        subject = f"{model}/{version}"
        targets = {f"{version}/{file.path}": file for file in files} | {file.path: file for file in beside}
        if "/" in model:
            raise LoadError(f"{subject}: expected a model name without '/'")
        for path in (model, *targets):
            _check_path(path, subject)
        place: Path | None = None
        try:
            place = await self._in_thread(lambda: self._disk.begin(model, targets))
            await self._in_thread(lambda: self._disk.make_room(targets.values(), subject))
            async with asyncio.TaskGroup() as group:
                for path, file in targets.items():
                    group.create_task(self._bring(file, place / model / path, f"{model}/{path}"))
            await self._in_thread(self._disk.collect)
        except BaseException as error:
            if place is not None:
                await self._in_thread(lambda: self._disk.remove(place))
            raise _reason(error, subject) from None
        return Fetched(place / model, place / model / str(version), _Once(lambda: self._release(place)))

    async def close(self) -> None:
        """Versions that are in use stay until they are released."""
        await self._in_thread(self._disk.close)
        self._pool.shutdown(wait=False)

    def _release(self, place: Path) -> None:
        def release() -> None:
            try:
                self._disk.remove(place)
                self._disk.collect()
            except OSError as error:
                log.warning("cache not cleared", directory=str(self._disk.root), reason=str(error))

        try:
            self._pool.submit(release)
        except RuntimeError:  # closed: what is released last is removed where it stands
            release()

    async def _bring(self, file: WantedFile, target: Path, subject: str) -> None:
        async with self._downloads:
            digest = file.sha256 or self._digests.get(file.key, "")
            if digest and await self._reuse(digest, file.size, target):
                return
            digest = await self._download(file, target, subject)
            if file.key:
                self._digests[file.key] = digest

    async def _reuse(self, digest: str, size: int | None, target: Path) -> bool:
        """Whether the blob was there. Read once, although it was checked when it came: a disk that lost bytes since would fail
        the version on every attempt, as long as the blob is there."""
        reader = await self._in_thread(lambda: self._disk.open_blob(digest))
        if reader is None:
            return False
        with reader:
            found = hashlib.sha256()
            while chunk := await self._in_thread(lambda: reader.read(HASHED_AT_ONCE)):
                await self._in_thread(functools.partial(found.update, chunk))
            if found.hexdigest() == digest and size in (None, reader.tell()):
                return await self._in_thread(lambda: self._disk.link_blob(digest, target))
        log.warning("cached file not what it was", sha256=digest, instead="downloads it again")
        await self._in_thread(lambda: self._disk.drop_blob(digest))
        return False

    async def _download(self, file: WantedFile, target: Path, subject: str) -> str:
        """The sha256 of what came. Nothing of it is left unless it is what was expected."""
        writer, temporary = await self._in_thread(lambda: self._disk.create_incoming())
        try:
            found, size = hashlib.sha256(), 0

            def write(chunk: bytes) -> None:
                _write_all(writer, chunk)
                found.update(chunk)

            chunks = file.open()
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    if file.size is not None and size > file.size:
                        raise LoadError(f"{subject}: expected {file.size} bytes, got more")
                    await self._writing(functools.partial(write, chunk))
            finally:
                await chunks.aclose()
            if file.size is not None and size != file.size:
                raise LoadError(f"{subject}: expected {file.size} bytes, got {size}")
            digest = found.hexdigest()
            if file.sha256 and digest != file.sha256:
                raise LoadError(f"{subject}: expected sha256 {file.sha256}, got {digest}")
            await self._writing(lambda: self._disk.keep(writer, temporary, digest, target))
            return digest
        finally:
            await self._in_thread(lambda: _discard(writer, temporary))

    async def _writing(self, call: Callable[[], None]) -> None:
        try:
            await self._in_thread(call)
        except OSError as error:
            if error.errno in FULL:
                raise LoadError(f"no space left in the cache {self._disk.root}") from None
            raise LoadError(f"the cache {self._disk.root} cannot be written: {error.strerror}") from None

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        """Short pieces only: a cancelled caller waits for the piece's end, so that what it then clears away stays away."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # looked at, so that nobody reports it as forgotten
            raise


class _Once:
    """A call that does something the first time only."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._calls = [call]

    def __call__(self) -> None:
        try:
            call = self._calls.pop()
        except IndexError:
            return
        call()


def _reason(error: BaseException, subject: str) -> BaseException:
    """What the caller of `fetch` gets: the first of several failures; LoadError for what could not be read."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return LoadError(f"{subject}: {error.strerror or error}")
    return error


def _check_path(path: str, subject: str) -> None:
    """What comes from a listing must stay inside the directory."""
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in path:
        raise LoadError(f"{subject}: expected file names inside the model's directory, got {path!a}")


# -- the disk ----------------------------------------------------------------------------------------------------------


class _Disk:
    """What lies in the cache's directory. Blocking, from any thread; the lock is around what this process shares between its
    threads: its session and the versions in it."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._limit = limit
        self._lock = threading.Lock()
        self._session: Path | None = None
        self._alive: int | None = None  # a descriptor: it is held until the process ends, unless the cache is closed
        self._places: set[Path] = set()
        self._is_closing = False

    @property
    def in_use(self) -> int:
        return len(self._places)

    def begin(self, model: str, paths: Iterable[str]) -> Path:
        """A new place for a version, with the directories of its files. Raises LoadError for a cache that cannot be written."""
        try:
            place = self._open_session() / "versions" / secrets.token_hex(8)
            with self._lock:
                self._places.add(place)
            for path in paths:
                (place / model / path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = "no space left in the cache" if error.errno in FULL else f"{error.strerror}: the cache"
            raise LoadError(f"{text} {self.root}") from None
        return place

    def remove(self, place: Path) -> None:
        now = time.time()
        for folder, _, names in os.walk(place):
            for name in names:
                os.utime(Path(folder, name), (now, now))  # the blob's own times: it has been in use until now
        shutil.rmtree(place, ignore_errors=True)
        with self._lock:
            self._places.discard(place)
        self._end_session()

    def close(self) -> None:
        self._is_closing = True
        self._end_session()

    def make_room(self, files: Iterable[WantedFile], subject: str) -> None:
        """Raises LoadError when what has to be downloaded does not fit on the disk, as far as sizes are known."""
        needed = {file.sha256 or file.key or file.path: file.size or 0 for file in files if not self._has_blob(file.sha256)}
        total = sum(needed.values())
        free = shutil.disk_usage(self.root).free
        self.collect(total, missing=total - free)
        free = shutil.disk_usage(self.root).free
        if free < total:
            raise LoadError(f"no space left in the cache {self.root}: {subject} needs {total} bytes, {free} are free")

    def collect(self, coming: int = 0, missing: int = 0) -> None:
        """Delete unused blobs, the longest unused first, while with `coming` bytes there are more than allowed, or until
        `missing` bytes were won."""
        with _locked(self.root / "lock"):
            blobs = []
            with os.scandir(self._blobs) as entries:
                for entry in entries:
                    blobs.append((entry.stat(follow_symlinks=False), entry.path))
            excess = max(sum(stat.st_size for stat, _ in blobs) + coming - self._limit, missing)
            for stat, path in sorted(blobs, key=lambda blob: blob[0].st_mtime_ns):
                if excess <= 0:
                    break
                if os.stat(path).st_nlink == 1:
                    os.unlink(path)
                    excess -= stat.st_size

    def open_blob(self, digest: str) -> BinaryIO | None:
        try:
            return (self._blobs / digest).open("rb", buffering=0)
        except FileNotFoundError:
            return None

    def link_blob(self, digest: str, target: Path) -> bool:
        """False if another process has deleted it meanwhile."""
        try:
            _link(self._blobs / digest, target)
        except FileNotFoundError:
            return False
        os.utime(target)
        return True

    def drop_blob(self, digest: str) -> None:
        (self._blobs / digest).unlink(missing_ok=True)

    def create_incoming(self) -> tuple[BinaryIO, Path]:
        path = self._open_session() / "incoming" / secrets.token_hex(8)
        return path.open("xb", buffering=0), path

    def keep(self, writer: BinaryIO, temporary: Path, digest: str, target: Path) -> None:
        """The blob gets its second link before it is one, so that nobody finds it unused. Read-only: whoever wrote into a
        version would write into all that share the file."""
        os.fchmod(writer.fileno(), 0o444)
        os.fsync(writer.fileno())
        _link(temporary, target)
        os.rename(temporary, self._blobs / digest)

    def _has_blob(self, digest: str) -> bool:
        return bool(digest) and (self._blobs / digest).exists()

    def _open_session(self) -> Path:
        with self._lock:
            if self._session is not None:
                return self._session
            sessions = self.root / "sessions"
            for directory in (self._blobs, sessions):
                directory.mkdir(parents=True, exist_ok=True)
            with _locked(self.root / "lock"):
                for session in sessions.iterdir():
                    _clear_dead(session)
                session = sessions / secrets.token_hex(8)
                for directory in (session / "incoming", session / "versions"):
                    directory.mkdir(parents=True)
                self._alive = os.open(session / "lock", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
                fcntl.flock(self._alive, fcntl.LOCK_EX)
            self._session = session
            return session

    def _end_session(self) -> None:
        with self._lock:
            if not self._is_closing or self._places or self._session is None or self._alive is None:
                return
            shutil.rmtree(self._session, ignore_errors=True)
            os.close(self._alive)
            self._session = self._alive = None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear_dead(session: Path) -> None:
    """Remove what a killed process has left. Its lock went with it."""
    try:
        with (session / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except FileNotFoundError:
        pass  # killed before it had one; nobody is making a session now
    shutil.rmtree(session, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in LINKLESS:
            raise
        shutil.copyfile(source, target)


def _write_all(writer: BinaryIO, chunk: bytes) -> None:
    """Unbuffered, so that a full disk shows where it is written and not once more when the file is closed."""
    left = memoryview(chunk)
    while left:
        left = left[writer.write(left) :]


def _discard(writer: BinaryIO, temporary: Path) -> None:
    writer.close()
    temporary.unlink(missing_ok=True)


__all__ = ["VersionCache", "WantedFile"]
