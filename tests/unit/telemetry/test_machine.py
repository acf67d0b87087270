from __future__ import annotations

from pathlib import Path

from headrace.telemetry.machine import MachineCollector


def proc(folder: Path, *, user: int, idle: int) -> Path:
    (folder / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    (folder / "meminfo").write_text("MemTotal:  1000 kB\nMemFree:  100 kB\nMemAvailable:  400 kB\nHugePages_Total:  0\n")
    return folder


def values(collector: MachineCollector) -> dict[str, float]:
    return {sample.name: sample.value for family in collector.collect() for sample in family.samples}


def test_utilisation_is_of_the_time_since_the_last_scrape(tmp_path: Path) -> None:
    collector = MachineCollector(proc(tmp_path, user=1000, idle=1000))
    proc(tmp_path, user=1030, idle=1010)
    assert values(collector)["nv_cpu_utilization"] == 0.75
    proc(tmp_path, user=1030, idle=1110)
    assert values(collector)["nv_cpu_utilization"] == 0.0


def test_no_time_passed_gives_no_utilisation(tmp_path: Path) -> None:
    assert "nv_cpu_utilization" not in values(MachineCollector(proc(tmp_path, user=1, idle=1)))


def test_used_memory_is_what_is_not_available(tmp_path: Path) -> None:
    found = values(MachineCollector(proc(tmp_path, user=1, idle=1)))
    assert found == {"nv_cpu_memory_total_bytes": 1000 * 1024, "nv_cpu_memory_used_bytes": 600 * 1024}


def test_where_there_is_no_proc_there_is_nothing(tmp_path: Path) -> None:
    assert values(MachineCollector(tmp_path / "missing")) == {}
