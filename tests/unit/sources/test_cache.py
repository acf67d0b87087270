from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from headrace.config import SourceConfig
from headrace.errors import LoadError
from headrace.sources import cache as module
from headrace.sources.base import Fetched
from headrace.sources.cache import VersionCache, WantedFile


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wanted(path: str, content: bytes, *, came: list[str] | None = None, sha256: str | None = None, key: str = "") -> WantedFile:
    """`came`: gets the path whenever it is downloaded."""

    async def stream() -> AsyncGenerator[bytes, None]:
        if came is not None:
            came.append(path)
        for start in range(0, len(content), 4096):
            yield content[start : start + 4096]

    return WantedFile(path, stream, len(content), digest_of(content) if sha256 is None else sha256, key)


def open_cache(tmp_path: Path, limit: int = 1 << 30) -> VersionCache:
    return VersionCache(SourceConfig(str(tmp_path / "cache"), limit))


def blobs(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "blobs").iterdir()}


def leftovers(tmp_path: Path) -> list[Path]:
    """Files of attempts and versions, the locks apart."""
    return [path for path in (tmp_path / "cache" / "sessions").rglob("*") if path.is_file() and path.name != "lock"]


async def release(cache: VersionCache, fetched: Fetched) -> None:
    """Until it is done: a release itself does not wait for the disk."""
    before = cache._disk.in_use
    fetched.release()
    while cache._disk.in_use == before:
        await cache._in_thread(lambda: None)
    await cache._in_thread(cache._disk.collect)


async def test_a_version_lies_as_sources_lay_it_out_and_shares_its_bytes_with_the_blob(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    fetched = await cache.fetch("digits", 3, [wanted("model.onnx", b"w" * 9000), wanted("a/b.bin", b"x")], [wanted("labels.txt", b"l")])
    assert (fetched.version_directory.name, fetched.version_directory.parent.name) == ("3", "digits")
    assert (fetched.version_directory / "a" / "b.bin").read_bytes() == b"x"
    assert (fetched.model_directory / "labels.txt").read_bytes() == b"l"
    blob = tmp_path / "cache" / "blobs" / digest_of(b"w" * 9000)
    assert blob.samefile(fetched.version_directory / "model.onnx")
    await cache.close()


async def test_a_file_is_downloaded_once_for_all_versions_and_sessions(tmp_path: Path) -> None:
    came: list[str] = []
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    await first.fetch("digits", 1, [wanted("model.onnx", b"same", came=came)])
    await second.fetch("digits", 2, [wanted("model.onnx", b"same", came=came), wanted("other", b"new", came=came)])
    assert came == ["model.onnx", "other"]
    await first.close()
    await second.close()


async def test_a_key_stands_for_a_digest_that_is_not_known(tmp_path: Path) -> None:
    came: list[str] = []
    cache = open_cache(tmp_path)
    for _ in range(2):
        await cache.fetch("digits", 1, [wanted("model.onnx", b"same", came=came, sha256="", key="etag-1")])
    await cache.fetch("digits", 1, [wanted("model.onnx", b"newer", came=came, sha256="", key="etag-2")])
    assert came == ["model.onnx"] * 2
    await cache.close()


async def test_a_wrong_digest_is_refused_and_not_kept(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    with pytest.raises(LoadError, match=f"digits/1/model.onnx: expected sha256 {'0' * 64}, got {digest_of(b'bytes')}"):
        await cache.fetch("digits", 1, [wanted("model.onnx", b"bytes", sha256="0" * 64)])
    assert (blobs(tmp_path), leftovers(tmp_path)) == (set(), [])
    await cache.close()


@pytest.mark.parametrize("size", [3, 7])
async def test_another_size_than_expected_is_refused(tmp_path: Path, size: int) -> None:
    cache = open_cache(tmp_path)
    file = wanted("model.onnx", b"bytes")
    with pytest.raises(LoadError, match=f"digits/1/model.onnx: expected {size} bytes, got"):
        await cache.fetch("digits", 1, [WantedFile("model.onnx", file.open, size)])
    assert leftovers(tmp_path) == []
    await cache.close()


async def test_a_blob_that_the_disk_has_damaged_is_downloaded_again(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    await release(cache, await cache.fetch("digits", 1, [wanted("model.onnx", b"bytes")]))
    blob = tmp_path / "cache" / "blobs" / digest_of(b"bytes")
    blob.chmod(0o644)
    blob.write_bytes(b"BYTES")
    fetched = await cache.fetch("digits", 1, [wanted("model.onnx", b"bytes")])
    assert (fetched.version_directory / "model.onnx").read_bytes() == b"bytes"
    await cache.close()


@pytest.mark.parametrize("path", ["../escaped", "a/../../b", "/etc/x", "a//b", ""])
async def test_a_file_name_that_leads_out_of_the_version_is_refused(tmp_path: Path, path: str) -> None:
    cache = open_cache(tmp_path)
    with pytest.raises(LoadError, match="expected file names inside"):
        await cache.fetch("digits", 1, [wanted(path, b"x")])
    await cache.close()


async def test_a_failed_download_is_a_load_error_and_complete_files_stay(tmp_path: Path) -> None:
    came: list[str] = []
    cache = open_cache(tmp_path)
    whole = wanted("whole", b"whole", came=came)
    await release(cache, await cache.fetch("digits", 1, [whole]))

    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"half"
        raise ConnectionResetError(errno.ECONNRESET, "connection reset")

    with pytest.raises(LoadError, match="digits/1: connection reset"):
        await cache.fetch("digits", 1, [whole, WantedFile("broken", broken, 8)])
    assert leftovers(tmp_path) == []
    await cache.fetch("digits", 1, [whole])
    assert came == ["whole"]
    await cache.close()


async def test_a_cancelled_fetch_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    began = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x" * 1000
            began.set()

    task = asyncio.create_task(cache.fetch("digits", 1, [WantedFile("model.onnx", endless)]))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (blobs(tmp_path), leftovers(tmp_path)) == (set(), [])
    await cache.close()


# -- space -------------------------------------------------------------------------------------------------------------


async def test_what_is_in_use_is_kept_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache, other = open_cache(tmp_path, limit=25), open_cache(tmp_path, limit=25)
    contents = {name: name.encode() * 10 for name in "abcd"}
    used = await other.fetch("m", 1, [wanted("f", contents["a"])])  # by another server, and the oldest of all
    for name in "bc":
        await release(cache, await cache.fetch("m", 2, [wanted("f", contents[name])]))
    await release(cache, await cache.fetch("m", 2, [wanted("f", contents["d"])]))
    assert blobs(tmp_path) == {digest_of(contents["a"]), digest_of(contents["d"])}
    await release(other, used)
    await release(cache, await cache.fetch("m", 2, [wanted("f", contents["b"])]))
    assert blobs(tmp_path) == {digest_of(contents["a"]), digest_of(contents["b"])}, "a was in use until after d was"
    await cache.close()
    await other.close()


async def test_release_counts_once(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, limit=0)
    fetched = await cache.fetch("m", 1, [wanted("f", b"x")])
    await release(cache, fetched)
    fetched.release()
    assert (blobs(tmp_path), leftovers(tmp_path)) == (set(), [])
    await cache.close()


async def test_a_version_in_use_outlives_the_closed_cache(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    fetched = await cache.fetch("m", 1, [wanted("f", b"x")])
    await cache.close()
    assert (fetched.version_directory / "f").read_bytes() == b"x"
    fetched.release()
    assert list((tmp_path / "cache" / "sessions").iterdir()) == []


async def test_a_version_that_does_not_fit_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    came: list[str] = []
    cache = open_cache(tmp_path)
    file = wanted("f", b"x", came=came)
    with pytest.raises(LoadError, match=rf"no space left in the cache .*: m/1 needs {1 << 60} bytes, \d+ are free"):
        await cache.fetch("m", 1, [WantedFile("f", file.open, 1 << 60)])
    assert (came, leftovers(tmp_path)) == ([], [])
    await cache.close()


FILL = """
import asyncio, pathlib, resource, signal, sys
from headrace.config import SourceConfig
from headrace.errors import LoadError
from headrace.sources.cache import VersionCache, WantedFile

async def main(root):
    async def stream():
        for _ in range(8):
            yield b"x" * (1 << 20)
    cache = VersionCache(SourceConfig(root))
    try:
        await cache.fetch("m", 1, [WantedFile("f", stream)])
    except LoadError as error:
        print(error)
    print(sorted(str(p.relative_to(root)) for p in pathlib.Path(root).rglob("*") if p.is_file() and p.name != "lock"))

asyncio.run(main(sys.argv[1]))
"""


def test_a_disk_that_fills_up_fails_the_fetch_and_nothing_else(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        done = subprocess.run([sys.executable, "-c", FILL, str(mount)], capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    assert done.stdout.splitlines() == [f"no space left in the cache {mount}", "[]"]


async def test_no_space_while_writing_is_said_and_the_temporary_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = open_cache(tmp_path)
    kept = await cache.fetch("m", 1, [wanted("f", b"kept")])
    monkeypatch.setattr(module, "_write_all", full)
    with pytest.raises(LoadError, match="no space left in the cache"):
        await cache.fetch("m", 2, [wanted("f", b"more")])
    assert blobs(tmp_path) == {digest_of(b"kept")}
    assert leftovers(tmp_path) == [kept.version_directory / "f"]
    await cache.close()


async def test_without_hard_links_versions_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    cache = open_cache(tmp_path, limit=0)
    fetched = await cache.fetch("m", 1, [wanted("f", b"x")])
    assert (fetched.version_directory / "f").read_bytes() == b"x"
    assert blobs(tmp_path) == set()
    await cache.close()


# -- other processes ---------------------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, signal, sys
from headrace.config import SourceConfig
from headrace.sources.cache import VersionCache, WantedFile

async def main(root):
    async def whole():
        yield b"whole"
    async def half():
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)
    cache = VersionCache(SourceConfig(root))
    await cache.fetch("m", 1, [WantedFile("f", whole)])
    await cache.fetch("m", 2, [WantedFile("f", half)])

asyncio.run(main(sys.argv[1]))
"""


async def test_what_a_killed_server_left_is_cleared_away_and_a_living_ones_is_not(tmp_path: Path) -> None:
    living = open_cache(tmp_path)
    kept = await living.fetch("m", 1, [wanted("f", b"kept")])
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(tmp_path / "cache"))
    assert await child.wait() == -9
    assert len(leftovers(tmp_path)) == 3  # the living one's, a version of the dead one, and half a file
    newcomer = open_cache(tmp_path)
    await release(newcomer, await newcomer.fetch("m", 3, [wanted("f", b"new")]))
    assert leftovers(tmp_path) == [kept.version_directory / "f"]
    assert blobs(tmp_path) == {digest_of(content) for content in (b"kept", b"whole", b"new")}
    await living.close()
    await newcomer.close()


def test_the_default_place_is_below_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place: Callable[[], str] = lambda: repr(VersionCache(SourceConfig()))  # noqa: E731
    assert str(tmp_path / "headrace" / "models") in place()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / ".cache" / "headrace" / "models") in place()
