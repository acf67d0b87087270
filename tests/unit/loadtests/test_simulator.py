"""What the scheduler is worth, in virtual time and so the same on every machine; `python -m loadtests.simulator` is the whole of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtests import simulator
from loadtests.simulator import GPU, MAGIKA, STEEP, Request, Table, Trace, bound, compare, simulate_fixed, simulate_ours


def trace_named(table: Table, name: str, count: int = 3000) -> Trace:
    return next(trace for trace in simulator.make_traces(table, count, seed=1) if trace.name == name)


def evenly(gap: float, count: int, slack: float, noise: float = 1.0, instances: int = 1) -> Trace:
    requests = [Request(number * gap, number * gap + slack) for number in range(count)]
    return Trace("even", requests, [noise], instances)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (GPU, "poisson 0.3"), (GPU, "poisson 2"), (GPU, "bursts"), (GPU, "mixed 0.8"), (GPU, "4 instances 1.5"),
        (STEEP, "poisson 0.9"), (STEEP, "heavy tail 0.7"), (STEEP, "mixed 1.5"), (MAGIKA, "poisson 0.8"),
    ],
    ids=lambda value: value.name if isinstance(value, Table) else value,
)  # fmt: skip
def test_as_good_as_the_best_fixed_setting_in_hindsight_and_at_rest_as_greedy(table: Table, name: str) -> None:
    runs = compare(table, trace_named(table, name))
    assert simulator.find_broken(runs) == []


@pytest.mark.parametrize("table", [GPU, STEEP, MAGIKA], ids=lambda table: table.name)
def test_twice_the_load_that_can_be_done_costs_nothing_of_what_is_done(table: Table) -> None:
    knee, double = (trace_named(table, f"poisson {load}", 6000) for load in ("1", "2"))
    at_knee, beyond = (simulate_ours(trace, table).good / trace.requests[-1].arrival for trace in (knee, double))
    assert beyond >= 0.95 * at_knee


@pytest.mark.parametrize("wrong", [0.3, 3.0])
def test_a_warm_up_that_was_far_off_is_corrected_by_what_runs(wrong: float) -> None:
    trace = trace_named(GPU, "poisson 0.8", 6000)
    known = {rows: wrong * seconds for rows, seconds in GPU.seconds.items()}
    assert simulate_ours(trace, GPU, known).good >= 0.95 * simulate_ours(trace, GPU).good
    assert simulate_ours(trace, GPU, {}).good >= 0.95 * simulate_ours(trace, GPU).good


@pytest.mark.parametrize("seed", range(10))
def test_nobody_does_better_than_the_oracle(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    trace = trace_named(rng.choice([GPU, STEEP, MAGIKA]), rng.choice(["poisson 1.2", "mixed 1.5", "bursts"]), 1000)
    table = next(table for table in (GPU, STEEP, MAGIKA) if trace in simulator.make_traces(table, 1000, seed=1))
    slack = 1 + 0.05 * bound(trace, table).good  # batches were 3 % faster or slower than l(b), by chance
    assert max(simulate_ours(trace, table).good, simulate_fixed(trace, table, 16, 0.0).good) <= bound(trace, table).good + slack


def test_a_fixed_setting_waits_for_its_delay_or_a_full_batch() -> None:
    two = Table("two", {1: 1.0, 2: 1.5})
    patient = simulate_fixed(evenly(gap=0.25, count=4, slack=10.0), two, size=2, delay=0.5)
    assert patient.rows == [2, 2]
    assert patient.latencies == [1.75, 1.5, 2.75, 2.5]
    assert simulate_fixed(evenly(gap=5.0, count=2, slack=10.0), two, size=2, delay=0.5).latencies == [1.5, 1.5]


def test_the_oracle_drops_what_no_order_could_save() -> None:
    """Six of ten can be done. It may end one slot late, since slots begin where requests do."""
    assert bound(evenly(gap=0.5, count=10, slack=2.0), Table("one", {1: 1.0, 64: 64.0})).good in (6, 7)


def test_the_report_names_every_run_and_the_same_seed_gives_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "TABLES", (MAGIKA,))
    monkeypatch.setattr(simulator, "SIZES", (1, 8))
    for name in ("a.json", "b.json"):
        simulator.main(["--requests", "100", "--json", str(tmp_path / name)])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report == json.loads((tmp_path / "b.json").read_text())
    assert report["kind"] == "simulator"
    assert {run["policy"] for run in report["runs"]} == {"ours", "greedy", "fixed", "informed", "oracle"}
