from __future__ import annotations

import mmap
import os
import tempfile
import threading
from pathlib import Path

import pytest
from headrace.errors import AlreadyExists, InvalidRequest, NotFound
from headrace.shared_memory import DIRECTORY, RESERVED, RegionStatus, SharedMemoryRegions

CONTENT = bytes(range(64))
SECOND_PAGE = mmap.ALLOCATIONGRANULARITY


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A directory as /dev/shm, with the object /a in it, and something outside that is nobody's business."""
    directory = tmp_path / "shm"
    directory.mkdir()
    (directory / "a").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(CONTENT)
    return directory


@pytest.fixture
def regions(objects: Path) -> SharedMemoryRegions:
    return SharedMemoryRegions(objects)


def mappings_of(path: Path) -> int:
    return sum(line.endswith(f" {path}") for line in Path("/proc/self/maps").read_text().splitlines())


def test_what_is_written_through_a_view_is_in_the_object(regions: SharedMemoryRegions, objects: Path) -> None:
    regions.register("r", "/a", 8, 48)
    view = regions.view("r", 4, 3)
    assert bytes(view) == CONTENT[12:15]
    view[:] = b"new"
    assert (objects / "a").read_bytes() == CONTENT[:12] + b"new" + CONTENT[15:]


def test_a_region_may_begin_anywhere_in_the_object(regions: SharedMemoryRegions, objects: Path) -> None:
    (objects / "b").write_bytes(bytes(SECOND_PAGE) + CONTENT)
    regions.register("r", "b", SECOND_PAGE + 5, 3)
    assert bytes(regions.view("r", 1, 2)) == CONTENT[6:8]


@pytest.mark.parametrize(("offset", "size"), [(0, 65), (1, 64), (64, 1), (65, 0), (0, 0), (2**64 - 1, 2**64 - 1), (0, 2**64 - 1)])
def test_a_region_is_a_part_of_its_object(regions: SharedMemoryRegions, offset: int, size: int) -> None:
    with pytest.raises(InvalidRequest, match=f"failed to register shared memory region 'r': invalid args.* got {size} from {offset}"):
        regions.register("r", "/a", offset, size)
    assert regions.status_of_all() == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "..",
        "/..",
        ".",
        "../secret",
        "/../secret",
        "sub/a",
        "/sub/../a",
        "a\0",
        "n" * 300,
        "nothing",
        "sub",
        "pipe",
        "link",
        "é" * 200,
    ],
)
def test_a_key_is_the_name_of_an_object_and_of_nothing_else(regions: SharedMemoryRegions, objects: Path, key: str) -> None:
    (objects / "sub").mkdir()
    (objects / "sub" / "a").write_bytes(CONTENT)
    (objects / "link").symlink_to(objects.parent / "secret")
    os.mkfifo(objects / "pipe")
    with pytest.raises(InvalidRequest, match="Unable to open shared memory region"):
        regions.register("r", key, 0, 1)
    assert regions.status_of_all() == []


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_tritons_own_objects_are_out_of_bounds(regions: SharedMemoryRegions, objects: Path, slashes: str) -> None:
    (objects / f"{RESERVED}1").write_bytes(CONTENT)
    with pytest.raises(InvalidRequest, match="expected none that begins with"):
        regions.register("r", f"{slashes}{RESERVED}1", 0, 1)


def test_an_object_that_may_not_be_written_is_refused(regions: SharedMemoryRegions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        assert flags & os.O_RDWR
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InvalidRequest, match="Unable to open shared memory region: '/a': Permission denied"):
        regions.register("r", "/a", 0, 1)


def test_a_name_is_one_regions_until_it_is_unregistered(regions: SharedMemoryRegions) -> None:
    regions.register("r", "/a", 0, 8)
    with pytest.raises(AlreadyExists, match="shared memory region 'r' already in manager"):
        regions.register("r", "/a", 0, 8)
    regions.unregister("r")
    regions.unregister("r")
    regions.register("r", "a", 8, 8)
    assert regions.status("r") == RegionStatus("r", "a", 8, 8)
    with pytest.raises(InvalidRequest, match="expected a name"):
        regions.register("", "/a", 0, 8)


def test_unknown_regions_are_not_found(regions: SharedMemoryRegions) -> None:
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'r'"):
        regions.view("r", 0, 1)
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'r'"):
        regions.status("r")


@pytest.mark.parametrize(
    ("offset", "size", "text"),
    [
        (16, 0, "Invalid offset for shared memory region: 'r': expected less than 16, got 16"),
        (2**63, 1, "Invalid offset for shared memory region"),
        (0, 17, r"Invalid offset \+ byte size for shared memory region: 'r': expected at most 16, got 0 \+ 17"),
        (15, 2, r"Invalid offset \+ byte size"),
    ],
)
def test_a_view_is_a_part_of_its_region_even_where_the_object_goes_on(
    regions: SharedMemoryRegions, offset: int, size: int, text: str
) -> None:
    regions.register("r", "/a", 8, 16)
    with pytest.raises(InvalidRequest, match=text):
        regions.view("r", offset, size)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from /proc")
def test_the_mapping_stays_until_its_last_user_has_gone(regions: SharedMemoryRegions, objects: Path) -> None:
    regions.register("r", "/a", 0, 64)
    first, second = regions.view("r", 0, 4), regions.view("r", 60, 4).toreadonly()
    regions.unregister_all()
    assert mappings_of(objects / "a") == 1
    first[:] = b"late"
    del first
    assert bytes(second) == CONTENT[60:]
    del second
    assert mappings_of(objects / "a") == 0
    assert (objects / "a").read_bytes()[:4] == b"late"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_nothing_stays_open_after_a_refusal_or_an_unregistration(regions: SharedMemoryRegions, objects: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (objects / "sub").mkdir()
    for key, size in (("/a", 65), ("sub", 1), ("/a", 0)):
        with pytest.raises(InvalidRequest):
            regions.register("r", key, 0, size)
    regions.register("r", "/a", 0, 64)
    regions.unregister("r")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="objects without pages need a file system in memory")
def test_an_object_whose_pages_may_find_no_room_is_refused() -> None:
    """Writing to them would be a SIGBUS."""
    space = os.statvfs(DIRECTORY)
    with tempfile.NamedTemporaryFile(dir=DIRECTORY) as sparse:
        size = space.f_blocks * space.f_frsize + (1 << 20)
        os.truncate(sparse.name, size)
        with pytest.raises(InvalidRequest, match=f"expected room for the {size} bytes .* that were never written, got .* free"):
            SharedMemoryRegions().register("r", Path(sparse.name).name, 0, 8)


def test_an_object_that_has_shrunk_is_refused_and_not_touched(regions: SharedMemoryRegions, objects: Path) -> None:
    """Reading beyond its end would be a SIGBUS."""
    regions.register("r", "/a", 0, 64)
    os.truncate(objects / "a", 0)
    with pytest.raises(InvalidRequest, match="expected '/a' to have at least the 64 bytes it had when it was registered, got 0"):
        regions.view("r", 0, 1)


def test_threads_may_register_use_and_unregister_at_once(regions: SharedMemoryRegions) -> None:
    faults: list[object] = []

    def use() -> None:
        for _ in range(2000):
            try:
                content = bytes(regions.view("r", 1, 2))
            except NotFound:
                continue
            except Exception as error:
                faults.append(error)
                return
            if content not in (CONTENT[1:3], CONTENT[9:11]):
                faults.append(content)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    while any(user.is_alive() for user in users):
        for offset in (0, 8):
            regions.register("r", "/a", offset, 8)
            regions.unregister("r")
    assert faults == []


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="this system keeps shared memory elsewhere")
def test_what_shm_open_makes_is_found_by_its_key() -> None:
    from multiprocessing.shared_memory import SharedMemory

    made = SharedMemory(create=True, size=64)
    try:
        regions = SharedMemoryRegions()
        regions.register("r", f"/{made.name}", 0, 64)
        regions.view("r", 10, 5)[:] = b"hello"
        assert bytes(made.buf[10:15]) == b"hello"
    finally:
        made.close()
        made.unlink()
