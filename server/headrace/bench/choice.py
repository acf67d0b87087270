"""Which batch sizes, instances and threads a model should have on this machine, from what was measured. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.batching.latency import BATCH_OVERHEAD, GOOD_ENOUGH, INLINE_LIMIT


@dataclass(frozen=True, slots=True, order=True)
class Setup:
    """So many loaded copies of the model, each with so many threads."""

    instances: int
    threads: int

    def __str__(self) -> str:
        return f"{_count(self.instances, 'instance')} of {_count(self.threads, 'thread')}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Batches of one size in one round, all instances busy: seconds of one, on average and what 95 of 100 stay within."""

    mean: float
    p95: float


Measured = Mapping[Setup, Mapping[int, Sequence[Sample]]]
"""By setup and rows of a batch, a sample a round. Every setup has the size 1, or the smallest that is allowed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What model.toml says or leaves to be inferred. `max_batch_size` 0: not batched; `allowed` empty: batches of any size."""

    setup: Setup
    max_batch_size: int
    allowed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Best:
    """The batch size at which a setup does most, and its rows a second in each round."""

    rows: int
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class Choice:
    """`now` and `then` are for the settings before and those chosen; `reasons` say why, a sentence each.

    `is_within_slo`: false when nothing that was measured is; then the settings are as they were.
    """

    settings: Settings
    now: Best
    then: Best
    reasons: tuple[str, ...]
    is_within_slo: bool = True


def setups(cores: int, present: Setup) -> list[Setup]:
    """Those worth measuring: powers of two that use no more than the cores, with all of them, and what the model has now."""
    found = {present}
    for threads in powers_of_two(cores):
        found.update(Setup(instances, threads) for instances in powers_of_two(cores // threads))
    return sorted(found)


def powers_of_two(largest: int) -> list[int]:
    """Up to `largest`, and that."""
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]
    return sizes if sizes[-1] == largest else [*sizes, largest]


def rate(setup: Setup, rows: int, sample: Sample) -> float:
    """Rows a second of all instances, with what the server itself does for each batch."""
    return setup.instances * rows / (sample.mean + BATCH_OVERHEAD)


def choose(measured: Measured, present: Settings, *, slo: float = 0.0, is_kept: bool = False, is_inline: bool = False) -> Choice:
    """The settings of the highest rate, or those there are when what they would gain is no clearer than the noise.

    Of rates within 3 % of the best the one that answers a single request soonest counts. `slo`, in seconds, 0 for none: only what
    takes at most so long counts. `is_kept`: the server knows of it and keeps batches that short by itself. `is_inline`: the server may
    run this model where requests arrive, with one instance.
    """
    fitting = {setup: within for setup in measured if (within := _within(measured[setup], slo))}
    now = _best(present.setup, measured[present.setup])
    if not fitting:
        quickest = min(measured, key=lambda setup: _p95(measured[setup], min(measured[setup])))
        took = _p95(measured[quickest], min(measured[quickest]))
        reason = f"nothing is within {_ms(slo)}: the smallest batch takes {_ms(took)} at the least, with {quickest}"
        return Choice(present, now, now, (reason,), is_within_slo=False)
    setup, why = _choose_setup(fitting, present.setup, is_inline=is_inline and _first(measured[present.setup]) < INLINE_LIMIT)
    then = _best(setup, fitting[setup])
    largest, why_largest = _choose_largest(measured[setup], present, 0.0 if is_kept else slo)
    allowed, why_allowed = _choose_allowed(measured[setup], present, largest, then.rows)
    return Choice(Settings(setup, largest, allowed), now, then, (why, *why_largest, *why_allowed))


def is_clear(rates: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `rates` are higher by more than noise: in every round than the others in any, and by more than 3 % in the middle."""
    return min(rates) > max(others) and GOOD_ENOUGH * statistics.median(rates) > statistics.median(others)


# -- instances and threads ---------------------------------------------------------------------------------------------


def _choose_setup(fitting: Measured, present: Setup, *, is_inline: bool) -> tuple[Setup, str]:
    """Of those with a size that fits; why."""
    candidates = {setup: _best(setup, fitting[setup]) for setup in fitting if not is_inline or setup.instances == 1}
    if not candidates:
        return present, _INLINE
    if present not in candidates:
        setup = _soonest(candidates, fitting)
        return setup, f"{setup} instead of {present}, which cannot run one row in time"
    now = candidates[present]
    better = {setup: best for setup, best in candidates.items() if is_clear(best.rates, now.rates)}
    if better:
        setup = _soonest(better, fitting)
        return setup, f"{setup} instead of {present}: {_gain(better[setup], now)} the rows a second"
    highest = max(candidates, key=lambda setup: candidates[setup].rate)
    if candidates[highest].rate > now.rate:
        gain = candidates[highest].rate / now.rate
        return present, f"{present} as before: {highest} did {gain:.2f} times as much, which is not clear of the noise"
    return present, f"{present}: nothing else does more rows a second{' on one instance. ' + _INLINE if is_inline else ''}"


def _soonest(candidates: Mapping[Setup, Best], measured: Measured) -> Setup:
    """Of those that do about the most the one where a single request, which waits for one batch of one, waits least."""
    highest = max(best.rate for best in candidates.values())
    setups = [setup for setup, best in candidates.items() if best.rate >= GOOD_ENOUGH * highest]
    # Of equals fewer instances, which take less memory.
    return min(setups, key=lambda setup: (_first(measured[setup]), setup))


_INLINE = "So short a model runs where its requests arrive, which takes one instance"


def _gain(then: Best, now: Best) -> str:
    """By the round: the machine may have been slower in one of them, for both."""
    gains = [a / b for a, b in zip(then.rates, now.rates, strict=True)]
    return f"{statistics.median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f}) times"


# -- batch sizes -------------------------------------------------------------------------------------------------------


def _choose_largest(sizes: Mapping[int, Sequence[Sample]], present: Settings, slo: float) -> tuple[int, tuple[str, ...]]:
    """max_batch_size, lowered only for the SLO: requests with more rows are refused. What pays the server finds out by itself."""
    largest = present.max_batch_size
    fitting = max(_within(sizes, slo), default=0)
    too_long = [rows for rows in sizes if rows > fitting]
    if not largest or not slo or not too_long or not fitting:
        return largest, ()
    took = _p95(sizes, min(too_long))
    what_else = "requests of more rows will be refused. Instead, or besides: slo_ms"
    return fitting, (f"max_batch_size {fitting}: {min(too_long)} rows take {_ms(took)}; {what_else}",)


def _choose_allowed(
    sizes: Mapping[int, Sequence[Sample]], present: Settings, largest: int, useful: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """allowed_batch_sizes: powers of two where a batch padded up to one is quicker than it is without, those there are otherwise."""
    if not largest:
        return (), ()
    if present.allowed:
        kept = tuple(rows for rows in present.allowed if rows < largest)
        return (*kept, largest), ()
    pairs = [(rows, above) for rows, above in padded(sizes) if above <= useful]
    paying = [pair for pair in pairs if _is_slower(sizes[pair[0]], sizes[pair[1]])]
    if not paying or 2 * len(paying) <= len(pairs):
        return (), ()
    rows, above = paying[-1]
    took, padded_took = (_ms(_mean(sizes, size)) for size in (rows, above))
    return tuple(powers_of_two(largest)), (f"allowed_batch_sizes: {rows} rows take {took}, {above} only {padded_took}",)


def padded(sizes: Mapping[int, object]) -> list[tuple[int, int]]:
    """(between, above): the sizes that are no power of two, each with the one that it would be padded up to."""
    pairs = [(rows, 1 << rows.bit_length()) for rows in sorted(sizes) if rows & (rows - 1)]
    return [(rows, above) for rows, above in pairs if above in sizes]


def _is_slower(samples: Sequence[Sample], others: Sequence[Sample]) -> bool:
    return is_clear([sample.mean for sample in samples], [sample.mean for sample in others])


# -- samples -----------------------------------------------------------------------------------------------------------


def _best(setup: Setup, sizes: Mapping[int, Sequence[Sample]]) -> Best:
    """The smallest batch that does as much as the best."""
    rates = {rows: tuple(rate(setup, rows, sample) for sample in samples) for rows, samples in sizes.items()}
    highest = max(map(statistics.median, rates.values()))
    rows = min(rows for rows, found in rates.items() if statistics.median(found) >= GOOD_ENOUGH * highest)
    return Best(rows, rates[rows])


def _within(sizes: Mapping[int, Sequence[Sample]], slo: float) -> dict[int, Sequence[Sample]]:
    """Those up to the first that takes longer: if a larger one seemed quicker, that was noise."""
    return dict(itertools.takewhile(lambda each: not slo or _p95(sizes, each[0]) <= slo, sorted(sizes.items())))


def _p95(sizes: Mapping[int, Sequence[Sample]], rows: int) -> float:
    return statistics.median(sample.p95 for sample in sizes[rows])


def _mean(sizes: Mapping[int, Sequence[Sample]], rows: int) -> float:
    return statistics.median(sample.mean for sample in sizes[rows])


def _first(sizes: Mapping[int, Sequence[Sample]]) -> float:
    """Seconds of the smallest batch: what a single request waits for at least."""
    return _mean(sizes, min(sizes))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
