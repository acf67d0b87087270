from __future__ import annotations

import dataclasses
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from headrace.backends import tensorrt_cache
from headrace.backends.tensorrt_cache import Device, PlanCache, PlanKey, _try_lock, choose_evicted, model_digest
from headrace.backends.tensorrt_options import BuildOptions
from headrace.backends.tensorrt_profiles import Profile, ShapeRange
from headrace.errors import LoadError
from structlog.testing import CapturingLogger

KEY = PlanKey(
    model="ab" * 32,
    tensorrt="11.4.0.106",
    device=Device("H200", "9.0", 580),
    profiles=(Profile({"x": ShapeRange((1, 4), (1, 4), (1, 4))}, 1),),
    build=BuildOptions(),
)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    cache = PlanCache(tmp_path / "engines", 1 << 20)
    cache.prepare()
    return cache


def keep(cache: PlanCache, key: PlanKey, content: bytes = b"plan", used: float | None = None) -> None:
    built = cache.new_file()
    built.write_bytes(content)
    cache.keep(key, built)
    if used is not None:
        os.utime(file_of(cache, key), (used, used))


def file_of(cache: PlanCache, key: PlanKey) -> Path:
    return cache.directory / f"{key.digest}.plan"


def other(name: str) -> PlanKey:
    return dataclasses.replace(KEY, model=name)


def found(cache: PlanCache, key: PlanKey) -> bytes | None:
    plan = cache.find(key)
    if plan is None:
        return None
    content = bytes(plan.content)
    plan.close()
    return content


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(KEY, model="cd" * 32),
        dataclasses.replace(KEY, tensorrt="11.3.0.99"),
        dataclasses.replace(KEY, device=Device("H100", "9.0", 580)),
        dataclasses.replace(KEY, device=Device("H200", "10.0", 580)),
        dataclasses.replace(KEY, device=Device("H200", "9.0", 590)),
        dataclasses.replace(KEY, profiles=(Profile({"x": ShapeRange((1, 4), (1, 4), (2, 4))}, 1),)),
        dataclasses.replace(KEY, build=BuildOptions(tf32=False)),
        dataclasses.replace(KEY, build=BuildOptions(refit=True)),
    ],
)
def test_whatever_decides_how_an_engine_is_built_is_in_its_key(changed: PlanKey) -> None:
    assert changed.digest != KEY.digest


def test_key_is_the_same_in_every_process() -> None:
    assert dataclasses.replace(KEY).digest == KEY.digest == "".join(KEY.digest)
    assert KEY.describe()["profiles"][0]["inputs"]["x"]["minimum"] == [1, 4]


def test_model_digest_covers_external_data_and_not_the_manifest(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    alone = model_digest(model)
    (tmp_path / "manifest.json").write_text("{}")
    assert model_digest(model) == alone
    (tmp_path / "weights.bin").write_bytes(b"one")
    with_data = model_digest(model)
    (tmp_path / "weights.bin").write_bytes(b"two")
    assert len({alone, with_data, model_digest(model)}) == 3


def test_bytes_cannot_move_between_files_unseen(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    digests = set()
    for content, name, rest in ((b"ab", "c", b"d"), (b"a", "bc", b"d"), (b"a", "b", b"cd"), (b"abc", "d", b"")):
        for file in tmp_path.iterdir():
            file.unlink()
        model.write_bytes(content)
        (tmp_path / name).write_bytes(rest)
        digests.add(model_digest(model))
    assert len(digests) == 4


def test_what_was_kept_is_found_again(cache: PlanCache) -> None:
    assert found(cache, KEY) is None
    keep(cache, KEY, b"the plan")
    assert found(cache, KEY) == b"the plan"
    assert found(cache, other("x")) is None


@pytest.mark.parametrize("position", [0, 3, -1, -12, -40])
def test_corrupted_plan_is_deleted_and_said_so(cache: PlanCache, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(tensorrt_cache, "log", log)
    keep(cache, KEY, b"the plan")
    raw = bytearray(file_of(cache, KEY).read_bytes())
    raw[position] ^= 1
    file_of(cache, KEY).write_bytes(raw)
    assert found(cache, KEY) is None
    assert not file_of(cache, KEY).exists()
    [call] = log.calls
    assert (call.method_name, call.kwargs["next"]) == ("warning", "it is built again")


@pytest.mark.parametrize("length", [0, 1, 8, 15, 16, 100])
def test_truncated_plan_is_none(cache: PlanCache, length: int) -> None:
    keep(cache, KEY, b"the plan")
    path = file_of(cache, KEY)
    path.write_bytes(path.read_bytes()[:length])
    assert found(cache, KEY) is None


def test_plan_of_another_key_under_this_name_is_none(cache: PlanCache) -> None:
    keep(cache, other("x"), b"the other one")
    os.replace(file_of(cache, other("x")), file_of(cache, KEY))
    assert found(cache, KEY) is None


def test_longest_unused_go_first_when_the_cache_is_full(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "engines", 3500)
    cache.prepare()
    for age, name in enumerate("abc"):
        keep(cache, other(name), b"x" * 500, used=1000.0 + age)
    assert found(cache, other("a")) is not None  # used now
    keep(cache, other("d"), b"x" * 500)
    kept = [name for name in "abcd" if file_of(cache, other(name)).exists()]
    assert "b" not in kept
    assert {"a", "d"} <= set(kept)


def test_the_latest_is_kept_however_large(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "engines", 10)
    cache.prepare()
    keep(cache, other("a"))
    keep(cache, other("b"))
    assert found(cache, other("a")) is None
    assert found(cache, other("b")) == b"plan"


def test_eviction_takes_no_more_than_it_must() -> None:
    files = [(Path("new"), 5, 3.0), (Path("old"), 5, 1.0), (Path("middle"), 5, 2.0)]
    assert choose_evicted(files, 15, Path("new")) == []
    assert choose_evicted(files, 10, Path("new")) == [Path("old")]
    assert choose_evicted(files, 1, Path("old")) == [Path("middle"), Path("new")]


def test_only_one_builds_a_key_and_the_other_finds_its_plan(cache: PlanCache) -> None:
    built = []

    def load(number: int) -> bytes | None:
        with cache.building(KEY, threading.Event()):
            content = found(cache, KEY)
            if content is None:
                built.append(number)
                keep(cache, KEY, b"by one of them")
                content = found(cache, KEY)
            return content

    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(load, range(4)))
    assert contents == [b"by one of them"] * 4
    assert len(built) == 1
    assert not list(cache.directory.glob("*.lock"))


def test_waiting_for_another_builder_ends_when_the_load_is_cancelled(cache: PlanCache) -> None:
    cancelled = threading.Event()
    with cache.building(KEY, threading.Event()), ThreadPoolExecutor(1) as pool:

        def wait() -> None:
            with cache.building(KEY, cancelled):
                raise AssertionError("somebody else builds it")

        waiting = pool.submit(wait)
        cancelled.set()
        with pytest.raises(LoadError, match="given up while another instance built"):
            waiting.result()


def test_lock_on_a_file_that_its_holder_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was opened just before the other builder was done: whoever comes next would lock a new file."""
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = _try_lock(path)
    assert descriptor is not None
    assert os.fstat(descriptor).st_ino == path.stat().st_ino
    assert len(calls) == 2
    os.close(descriptor)


def test_other_keys_are_built_meanwhile(cache: PlanCache) -> None:
    with cache.building(KEY, threading.Event()), cache.building(other("x"), threading.Event()):
        pass


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "engines"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(LoadError, match=f"nobody else can write to, got user .*mode {mode:o}"):
        PlanCache(directory, 1).prepare()


def test_what_a_build_left_long_ago_is_deleted(cache: PlanCache) -> None:
    old, new = cache.new_file(), cache.new_file()
    os.utime(old, (0, 0))
    keep(cache, KEY)
    assert (old.exists(), new.exists()) == (False, True)


def test_timings_are_of_one_version_and_one_kind_of_device(cache: PlanCache) -> None:
    same = dataclasses.replace(KEY, model="other", build=BuildOptions(tf32=False))
    assert cache.timings(KEY) == cache.timings(same)
    assert cache.timings(KEY) != cache.timings(dataclasses.replace(KEY, tensorrt="10.1.0"))
