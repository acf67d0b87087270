from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loadtests.arrivals import Times, bursts, constant, poisson, ramp, read_trace

PROCESSES: dict[str, Callable[[float, float, int], Times]] = {
    "constant": lambda rate, seconds, seed: constant(rate, seconds),
    "poisson": poisson,
    "bursts": bursts,
    "all in bursts": lambda rate, seconds, seed: bursts(rate, seconds, seed, peak=5.0, share=0.2),
    "ramp": lambda rate, seconds, seed: ramp(0.5 * rate, 1.5 * rate, seconds, seed),
    "ramp down": lambda rate, seconds, seed: ramp(2 * rate, 0.0, seconds, seed),
    "level ramp": lambda rate, seconds, seed: ramp(rate, rate, seconds, seed),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("rate", [40.0, 3000.0])
def test_each_process_has_the_rate_that_was_asked_for_in_the_mean(name: str, rate: float) -> None:
    counts = [len(PROCESSES[name](rate, 8.0, seed)) for seed in range(40)]
    spread = np.std(counts) / np.sqrt(len(counts))
    assert abs(np.mean(counts) - rate * 8.0) <= 4 * spread + 1


@pytest.mark.parametrize("name", PROCESSES)
def test_times_ascend_within_the_run_and_come_again_with_their_seed(name: str) -> None:
    times = PROCESSES[name](500.0, 3.0, 7)
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert times[-1] < 3.0
    assert np.array_equal(times, PROCESSES[name](500.0, 3.0, 7))


def dispersion(times: Times, seconds: float, window: float = 0.05) -> float:
    """Variance over mean of the counts in windows: 1 of a Poisson process, 0 of a constant one."""
    counts = np.histogram(times, np.arange(0.0, seconds + window / 2, window))[0]
    return float(counts.var() / counts.mean())


def test_bursts_are_bursts_and_poisson_is_not() -> None:
    assert dispersion(bursts(2000.0, 60.0, 1), 60.0) > 10
    assert 0.8 < dispersion(poisson(2000.0, 60.0, 1), 60.0) < 1.2
    assert dispersion(constant(2000.0, 60.0), 60.0) < 0.01


def test_a_ramp_ends_at_the_rate_that_was_asked_for() -> None:
    times = ramp(1000.0, 3000.0, 40.0, 3)
    assert np.sum(times < 4.0) == pytest.approx(4.0 * 1100, rel=0.1)
    assert np.sum(times >= 36.0) == pytest.approx(4.0 * 2900, rel=0.1)


@pytest.mark.parametrize(("peak", "share"), [(6.0, 0.2), (0.5, 0.2), (2.0, 0.0), (1.0, 1.0)])
def test_bursts_that_cannot_be_are_refused(peak: float, share: float) -> None:
    with pytest.raises(ValueError, match="peak \\* share <= 1"):
        bursts(100.0, 1.0, 1, peak=peak, share=share)


def test_a_trace_begins_at_its_first_time_and_can_be_sped_up(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("# recorded\n10.5\n10.5\n\n12.5\n")
    assert read_trace(path, speed=2.0).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("text", "message"), [("1\nx\n", "line 2: expected a time"), ("2\n1\n", "line 2: .* ascending"), ("", "got none")])
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)
