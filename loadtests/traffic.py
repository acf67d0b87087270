"""Steady calls whose every answer is judged and timed, and what the record of them says about a stretch of time."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from loadtests.calls import INFER_PATH
from loadtests.cancel_storm import CLIENTS_PER_CHANNEL, HANG, channels
from loadtests.statistics import percentile
from loadtests.variants import Answers, Verdict

Times = NDArray[np.float64]
NO_VERSION = -1


@dataclass(slots=True)
class Record:
    """All calls to one model, by one event loop. `versions` is NO_VERSION where the call failed.

    Plain arrays, because a million objects would make the collector stop the client now and then, and that is not the server's.
    """

    model: str
    started: array[float] = field(default_factory=lambda: array("d"))
    ended: array[float] = field(default_factory=lambda: array("d"))
    versions: array[int] = field(default_factory=lambda: array("q"))
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    """What was not as it must be, with how often."""
    first_answers: dict[int, float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at each version's first answer."""

    def add(self, started: float, ended: float, version: int) -> None:
        self.started.append(started)
        self.ended.append(ended)
        self.versions.append(version)
        if version != NO_VERSION and version not in self.first_answers:
            self.first_answers[version] = ended
            self.news.set()

    def latencies(self, since: float, until: float) -> Times:
        """Of the answered calls that began then."""
        started, ended, versions = self._arrays()
        chosen: Times = (ended - started)[(started >= since) & (started < until) & (versions != NO_VERSION)]
        return chosen

    def overlapping(self, windows: Sequence[tuple[float, float]]) -> Times:
        """Latencies of the answered calls that were under way at any time of any window."""
        started, ended, versions = self._arrays()
        chosen = np.zeros(len(started), np.bool_)
        for since, until in windows:
            chosen |= (ended >= since) & (started <= until)
        latencies: Times = (ended - started)[chosen & (versions != NO_VERSION)]
        return latencies

    def count(self, since: float, until: float) -> tuple[int, int]:
        """Calls that began then, and how many of them failed."""
        started, _, versions = self._arrays()
        chosen = (started >= since) & (started < until)
        return int(chosen.sum()), int((chosen & (versions == NO_VERSION)).sum())

    def steps_back(self) -> int:
        """Calls that began after a version had answered and were answered by an older one."""
        started, _, versions = self._arrays()
        firsts = sorted((at, version) for version, at in self.first_answers.items())
        if not firsts:
            return 0
        newest = np.concatenate(([NO_VERSION], np.maximum.accumulate([version for _, version in firsts])))
        known = newest[np.searchsorted([at for at, _ in firsts], started, side="right")]
        return int(((versions != NO_VERSION) & (versions < known)).sum())

    def _arrays(self) -> tuple[Times, Times, NDArray[np.int64]]:
        # Copies, because an array that a view exists of cannot grow.
        return np.array(self.started), np.array(self.ended), np.array(self.versions)

    async def wait_for(self, version: int, patience: float) -> bool:
        """Whether that version or a newer one has answered before the patience is at its end."""
        try:
            async with asyncio.timeout(patience):
                while max(self.first_answers, default=NO_VERSION) < version:
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            return False
        return True


def misnamed(first_answers: Mapping[int, float], published: Mapping[int, float]) -> list[str]:
    """Versions that answered and were not published, or not yet."""
    never = [f"version {v} answered and was never published" for v in sorted(first_answers) if v not in published]
    early = [v for v, at in sorted(first_answers.items()) if v in published and at < published[v]]
    return never + [f"version {v} answered {published[v] - first_answers[v]:.3f} s before it was published" for v in early]


def delays(first_answers: Mapping[int, float], published: Mapping[int, float]) -> list[float]:
    """Seconds from publication to first answer, of the versions that answered."""
    return [first_answers[version] - at for version, at in published.items() if version in first_answers]


def overtaken_delays(first_answers: Mapping[int, float], published: Mapping[int, float]) -> list[float]:
    """Seconds from each publication to the first answer of that version or a newer one; infinite where none came.

    A server that gives up what it is loading for whatever is newer can leave the old version serving as long as somebody publishes.
    """
    return [min((a for v, a in first_answers.items() if v >= version), default=float("inf")) - at for version, at in published.items()]


def p_ms(latencies: Times, percent: float) -> float:
    """NaN where nothing was measured, which no comparison takes for good."""
    return percentile(latencies, percent) * 1e3 if len(latencies) else float("nan")


async def _call_on(channel: Any, answers: Answers, record: Record, random: Random) -> None:
    """One call after another until cancelled."""
    infer = channel.unary_unary(INFER_PATH)
    while True:
        number = random.randrange(len(answers.messages))
        started = time.monotonic()
        try:
            message = await infer(answers.messages[number], timeout=HANG)
        except grpc.aio.AioRpcError as error:
            record.troubles[f"{error.code().name}: {error.details()}"] += 1
            record.add(started, time.monotonic(), NO_VERSION)
            await asyncio.sleep(0.01)  # a server that is away would be asked in a busy loop
            continue
        ended = time.monotonic()
        _enter(record, answers, number, message, started, ended)


def _enter(record: Record, answers: Answers, number: int, message: bytes, started: float, ended: float) -> None:
    named = service_pb2.ModelInferResponse.FromString(message).model_version
    if not named.isdecimal():
        record.troubles[f"an answer names version {named!r}"] += 1
        record.add(started, ended, NO_VERSION)
        return
    record.add(started, ended, int(named))
    verdict = answers.judge(int(named), number, message)
    record.verdicts[verdict] += 1
    if verdict in (Verdict.OTHER, Verdict.WRONG):
        record.troubles[f"an answer is wrong: {verdict}"] += 1


@asynccontextmanager
async def traffic(address: str, loads: Sequence[tuple[Answers, int]], seed: int) -> AsyncIterator[list[Record]]:
    """For each model so many closed loops, on connections of its own, while the block runs. A call under way at its end is given up."""
    records = [Record(answers.model) for answers, _ in loads]
    counts = [-(-concurrency // CLIENTS_PER_CHANNEL) for _, concurrency in loads]
    async with channels(address, sum(counts)) as opened, asyncio.TaskGroup() as group:
        tasks = []
        for (answers, concurrency), record, count in zip(loads, records, counts, strict=True):
            own, opened = opened[:count], opened[count:]
            for number in range(concurrency):
                random = Random(f"{seed}/{answers.model}/{number}")
                tasks.append(group.create_task(_call_on(own[number % count], answers, record, random)))
        try:
            yield records
        finally:
            for task in tasks:
                task.cancel()
