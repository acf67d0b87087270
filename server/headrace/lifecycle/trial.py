"""A new version on trial beside the one before it: who gets which requests, and what comes of it (rollout.py judges)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.config import RolloutConfig
from headrace.errors import InvalidRequest
from headrace.lifecycle import answers
from headrace.lifecycle.answers import Answers
from headrace.lifecycle.rollout import Decision, Evidence, Verdict, evidence, is_at_the_end, is_chosen, judge, spread, table
from headrace.lifecycle.shadow import Shadow
from headrace.lifecycle.version import ModelVersion
from headrace.lifecycle.view import Call, Refused, RolloutDescription, Submits
from headrace.requests import InferRequest, Reply

LOOK_EVERY = 0.25
"""Seconds. The look itself takes microseconds; a bad version should not serve longer than the evidence takes."""

Conclude = Callable[["Trial", str, str], None]


class Trial:
    """Owns the phase, the split and the shadow. Event loop only, but for `divert`: any thread.

    `conclude(trial, phase, reason)` is told of a verdict: promoted, rolled_back or passed.
    """

    def __init__(self, candidate: ModelVersion, baseline: ModelVersion, config: RolloutConfig, conclude: Conclude) -> None:
        self.candidate = candidate
        self.baseline = baseline
        self.config = config
        self.phase = "running"
        self.reason = ""
        self._conclude = conclude
        self._began = time.time()
        self._began_monotonic = time.monotonic()
        self._before = (candidate.counters.snapshot(), baseline.counters.snapshot())
        self._drift_before = (candidate.drift, baseline.drift)
        self._counter = itertools.count()
        self._shadow = Shadow(candidate.model, candidate.version, config.tolerance)
        for version in (candidate, baseline):
            version.screen_outputs(True)

    def __repr__(self) -> str:
        return f"Trial({self.candidate.name} beside {self.baseline.name}, {self.config.mode}, {self.phase})"

    @property
    def is_running(self) -> bool:
        """Whether both versions are still needed: also when it has passed and waits for a promotion by hand."""
        return self.phase in ("running", "passed")

    @property
    def default(self) -> ModelVersion:
        return self.candidate if self.config.mode == "probation" else self.baseline

    @property
    def shadow(self) -> Shadow:
        return self._shadow

    def change(self, mode: str, percent: float) -> None:
        self.config = replace(self.config, mode=mode, percent=percent)

    def end(self, phase: str, reason: str) -> None:
        self.phase = phase
        self.reason = reason
        self._shadow.close()
        for version in (self.candidate, self.baseline):
            version.screen_outputs(False)

    # -- requests: any thread ------------------------------------------------------------------------------------------

    def divert(self, request: InferRequest) -> Submits | None:
        """The candidate for a canary's share of the requests, always the same ones where they have an id or a sequence; for a
        shadow's share whoever answers, with a copy to the candidate."""
        config = self.config
        if config.mode == "probation":
            return None
        key = sticky_key(request)
        is_mine = is_chosen(key, config.percent) if key else spread(next(self._counter), config.percent)
        if not is_mine:
            return None
        return self.candidate if config.mode == "canary" else _Mirrored(self)

    # -- the verdict ---------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at the evidence until the trial ends; also while one that has passed waits for its promotion by hand."""
        while self.is_running:
            await asyncio.sleep(LOOK_EVERY)
            if not self.is_running:
                return
            verdict = self.look()
            if verdict.decision is Decision.ROLLBACK:
                self._conclude(self, "rolled_back", verdict.reason)
            elif verdict.decision is Decision.PASSED and self.config.promote == "auto":
                self._conclude(self, "promoted", verdict.reason)
            elif verdict.decision is Decision.PASSED and self.phase == "running":
                self.phase, self.reason = "passed", verdict.reason
                self._conclude(self, "passed", verdict.reason)

    def look(self) -> Verdict:
        candidate, baseline = self._evidence()
        elapsed = time.monotonic() - self._began_monotonic
        if not answers.is_watched(self.config):
            return judge(self.config, candidate, baseline, elapsed)
        judged = answers.judge_answers(self.config, *self._answers(), is_at_the_end(self.config, candidate, elapsed))
        return judge(self.config, candidate, baseline, elapsed, judged.faults, judged.unknown)

    def _evidence(self) -> tuple[Evidence, Evidence]:
        """On probation the old version has nothing to do any more: what it did before is what there is to compare with."""
        before = None if self.config.mode == "probation" else self._before[1]
        shadow = self._shadow.snapshot()
        candidate = evidence(self.candidate.counters.snapshot(), self._before[0], compared=shadow.compared, disagreeing=shadow.disagreeing)
        return candidate, evidence(self.baseline.counters.snapshot(), before)

    def _answers(self) -> tuple[Answers, Answers]:
        """The same of what drift counted: rows are counted a second or so after they were answered."""
        before = None if self.config.mode == "probation" else self._drift_before[1]
        candidate = answers.answers(self.candidate.version, self.candidate.drift, self._drift_before[0])
        return candidate, answers.answers(self.baseline.version, self.baseline.drift, before)

    def describe(self) -> RolloutDescription:
        candidate, baseline = self._evidence()
        elapsed = time.monotonic() - self._began_monotonic
        return RolloutDescription(
            mode=self.config.mode,
            phase=self.phase,
            candidate=self.candidate.version,
            baseline=self.baseline.version,
            percent=100.0 if self.config.mode == "probation" else self.config.percent,
            began=self._began,
            seconds_left=max(self.config.probation - elapsed, 0.0),
            requests=candidate.compared if self.config.mode == "shadow" else candidate.answered,
            min_requests=self.config.min_requests,
            reason=self.reason,
            evidence=(*table(candidate, baseline), *self._describe_answers()),
        )

    def _describe_answers(self) -> tuple[tuple[str, str, str], ...]:
        return answers.table(*self._answers()) if answers.is_watched(self.config) else ()


class _Mirrored:
    """The version that serves, with a copy of the request to the candidate."""

    __slots__ = ("_trial",)

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def submit(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        trial = self._trial
        trial.shadow.mirror(request, reply, trial.candidate)
        trial.baseline.submit(request, reply, arrived)

    def submit_all(self, calls: Sequence[Call], arrived: float) -> list[Refused]:
        trial = self._trial
        for request, reply in calls:
            trial.shadow.mirror(request, reply, trial.candidate)
        return trial.baseline.submit_all(calls, arrived)


def sticky_key(request: InferRequest) -> str:
    """What keeps requests together: their sequence, or else their id; empty where they have neither."""
    sequence = request.parameters.get("sequence_id") if request.parameters else None
    if isinstance(sequence, bool) or sequence in (None, 0, ""):
        return request.id
    if not isinstance(sequence, (int, str)):
        raise InvalidRequest(f"parameter 'sequence_id': expected a number or a string, got {sequence!r}")
    return str(sequence)
