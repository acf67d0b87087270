"""All setups of a model, measured in turn."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from headrace.backends.base import BackendRegistry, select_file
from headrace.bench.choice import Measured, Sample, Settings, Setup, powers_of_two, setups
from headrace.bench.trial import Trial, run_trial
from headrace.errors import ConfigError, LoadError
from headrace.lifecycle.effective import EffectiveModel, without_batching
from headrace.lifecycle.inspection import Inspection
from headrace.lifecycle.memory import available_memory
from headrace.lifecycle.warm_up import BatchAxisError, batch_sizes, has_free_dimension
from headrace.sources.base import Fetched

ROUNDS = 3
"""Each goes over all setups, every second one in reverse: a machine that is busy for a while is so for all."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model and what it is served with now, on the cores it is to be served on."""

    effective: EffectiveModel
    inspection: Inspection
    fetched: Fetched
    cores: frozenset[int]

    @property
    def settings(self) -> Settings:
        batching, instances = self.effective.batching, self.effective.instances
        threads = instances.threads or max(len(self.cores) // instances.count, 1)
        return Settings(Setup(instances.count, threads), batching.max_batch_size or 0, batching.allowed_batch_sizes)

    @property
    def is_inline(self) -> bool:
        """As ModelVersion decides it, but for the time that a row takes."""
        signature = self.effective.signature
        is_known = not has_free_dimension(signature) and all(spec.datatype.itemsize for spec in signature.inputs)
        return is_known and self.effective.instances.count == 1 and not self.effective.batching.max_queue_delay


def available_cores(count: int | None) -> frozenset[int]:
    """The first `count` of those that this process may use, all for None. Raises ConfigError for more than there are."""
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if count is not None and not 1 <= count <= len(there):
        raise ConfigError(f"--cores: expected 1 to {len(there)}, which this process may use, got {count}")
    return frozenset(there[:count])


def sizes_to_try(settings: Settings) -> tuple[int, ...]:
    """Powers of two up to the largest, and halfway between them where it is to be found out whether padding pays."""
    if not settings.max_batch_size or settings.allowed:
        return tuple(batch_sizes(settings.max_batch_size, settings.allowed))
    powers = powers_of_two(settings.max_batch_size)
    between = [3 * size // 2 for size in powers if size > 1 and not size & (size - 1) and 2 * size in powers]
    return tuple(sorted({*powers, *between}))


@dataclass(frozen=True, slots=True)
class Progress:
    done: int
    of: int
    setup: Setup
    sizes: Mapping[int, Sample]


def measure(
    subject: Subject, backends: BackendRegistry, seconds: float, tell: Callable[[Progress], None]
) -> tuple[Subject, Measured, list[str]]:
    """Each setup and size for `seconds` in all. Also the subject as it turned out to be, and what is worth saying.

    Raises LoadError or BackendError with the model's reason.
    """
    try:
        measured, notes = _measure(subject, backends, seconds, tell)
    except BatchAxisError as error:
        effective = without_batching(subject.effective, str(error))
        subject = dataclasses.replace(subject, effective=effective)
        measured, notes = _measure(subject, backends, seconds, tell)
        notes.append(effective.notes[-1])
    return subject, measured, notes


def _measure(subject: Subject, backends: BackendRegistry, seconds: float, tell: Callable[[Progress], None]) -> tuple[Measured, list[str]]:
    wanted, notes = _fitting(subject, backends)
    measured: dict[Setup, dict[int, list[Sample]]] = {setup: {} for setup in wanted}
    for done, setup in enumerate(_in_turn(wanted)):
        # What the first round has found to be worth nothing is not measured again.
        before = tuple(measured[setup])
        samples = run_trial(_trial(subject, setup, before or sizes_to_try(subject.settings), seconds / ROUNDS, is_first=not before))
        for rows, sample in samples.items():
            measured[setup].setdefault(rows, []).append(sample)
        tell(Progress(done + 1, ROUNDS * len(wanted), setup, samples))
    return measured, notes


def _in_turn(wanted: list[Setup]) -> Iterator[Setup]:
    for number in range(ROUNDS):
        yield from wanted if number % 2 == 0 else reversed(wanted)


def _fitting(subject: Subject, backends: BackendRegistry) -> tuple[list[Setup], list[str]]:
    """The setups that memory suffices for."""
    present = subject.settings.setup
    path = select_file(subject.fetched.version_directory, subject.effective.filename)
    each, there = backends[subject.effective.backend].estimate_memory(path), available_memory()
    if present.instances * each > there:
        raise LoadError(f"{present} may need {present.instances * each >> 20} MiB, {there >> 20} are available")
    found = setups(len(subject.cores), present)
    wanted = [setup for setup in found if setup.instances * each <= there]
    left_out = ", ".join(str(setup) for setup in found if setup not in wanted)
    return wanted, [f"left out for want of memory: {left_out}"] if left_out else []


def _trial(subject: Subject, setup: Setup, sizes: tuple[int, ...], seconds: float, *, is_first: bool) -> Trial:
    effective, recorded = subject.effective, subject.inspection.recorded
    return Trial(
        effective.backend,
        select_file(subject.fetched.version_directory, effective.filename),
        effective.signature,
        dataclasses.replace(effective.instances, count=setup.instances, threads=setup.threads),
        subject.cores,
        sizes,
        seconds,
        is_first,
        recorded[0][1] if recorded else None,
        effective.processing,
        effective.output_names,
    )


__all__ = ["Progress", "Subject", "available_cores", "measure"]
