"""Labels joined with what was predicted: one part in each version that takes them, found by model and request id.

The way of an answer. `look` (the thread that ran the batch) keeps ids and the output, without copying; a thread of this module's works out
once a second what was predicted, many batches at once, since numpy's calls cost the same for one row as for a hundred. Labels may come
sooner, a client has them as soon as it likes: who joins works out first what is there, so an answer is unknown for the microseconds
between its leaving and `look` alone. Nothing is left out: where too much has gathered, the thread that brings more does the work.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from headrace.batching.observer import Array, RanBatch
from headrace.errors import ConfigError, FailedPrecondition
from headrace.feedback.predictions import Found, Prediction, Predictions, is_kept
from headrace.feedback.statistics import Classification, ClassificationCounter, Regression, RegressionCounter
from headrace.feedback.subject import UNNAMED, ClassNames, Subject, choose, predictions
from headrace.lifecycle.effective import EffectiveModel
from headrace.signature import Signature
from headrace.telemetry.log import get_logger
from headrace.threads import be_patient

log = get_logger(__name__)

INTERVAL = 1.0
"""Seconds for which answers gather."""
MOST_BATCHES = 4096
MOST_BYTES = 16 << 20
"""Of one version, that gather."""
MOST_ERROR = 1e100
"""Of a number: squares beyond it are infinite, and with one of those the sums would say nothing ever after."""
MOST_PROBLEMS = 10
OUTCOMES = ("matched", "unknown", "expired", "duplicate", "invalid")
"""What became of a request's labels: joined; of a request that nobody here answered, or without an id, or that named other outputs; of one
that was kept once and is no more; of one that has its labels; not such as the version can take."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A request's labels, one a row, in one of three kinds; the others are empty."""

    id: str
    classes: Sequence[int] = ()
    names: Sequence[str] = ()
    values: Sequence[float] = ()

    @property
    def count(self) -> int:
        return len(self.classes) + len(self.names) + len(self.values)


@dataclass(slots=True)
class Joined:
    """Requests by outcome, and the first reasons of those that were invalid."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    rows: int = 0
    problems: list[str] = field(default_factory=list)


class _Answers(NamedTuple):
    """Of a batch: id and rows of each request, in their order; an empty id where its prediction is not kept. `output`: [rows, elements]."""

    requests: Sequence[tuple[str, int]]
    output: Array
    done: float


@dataclass(frozen=True, slots=True)
class FeedbackReport:
    """What one version's labels say. One of `classification` and `regression`. `waiting_rows`: predictions without labels as yet;
    `unidentified`: requests whose labels can never come, for want of an id, or of that output; `replaced`: whose id was used again."""

    model: str
    version: int
    output: str
    waiting_rows: int
    unidentified: int
    replaced: int
    classification: Classification | None = None
    regression: Regression | None = None
    classes: tuple[tuple[int, str], ...] = ()
    """Names of the classes in the confusion."""


class VersionFeedback:
    """Owns one version's predictions and what their labels have shown, under one lock. Any thread."""

    def __init__(self, owner: Feedbacks, model: str, version: int, signature: Signature, subject: Subject, kept: Predictions) -> None:
        self._owner = owner
        self.model = model
        self.version = version
        self._subject = subject
        self._is_batching = signature.is_batching
        self._index = next(index for index, spec in enumerate(signature.outputs) if spec.name == subject.output)
        self._classes = ClassNames(subject)
        self._lock = threading.Lock()
        self._kept = kept
        self._right = ClassificationCounter()
        self._errors = RegressionCounter()
        self._unidentified = 0
        self._gathered: deque[_Answers] = deque()
        self._gathered_bytes = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"VersionFeedback({self.model}:{self.version}, {self._subject.output}, {self._kept!r})"

    def look(self, batch: RanBatch) -> None:
        if self._is_closed:
            return
        try:
            self._gather(batch)
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        """Wrong with one, wrong with all: not a traceback for each batch from now on."""
        self._is_closed = True
        log.exception("feedback failed and stops", model=self.model, version=self.version)

    def _gather(self, batch: RanBatch) -> None:
        index = self._index
        requests = [(ticket.id if index in ticket.outputs else "", ticket.rows) for ticket in batch.tickets]
        if self._subject.output not in batch.outputs:
            with self._lock:
                self._unidentified += len(requests)
            return
        array = batch.arrays[batch.outputs.index(self._subject.output)]
        if batch.is_lent:
            array = array.copy()
        output = array[: batch.rows].reshape(batch.rows, -1) if self._is_batching else array.reshape(1, -1)
        if not output.shape[1]:
            with self._lock:
                self._unidentified += len(requests)
            return
        # Summed up without a lock: it bounds memory, and need not be exact.
        self._gathered_bytes += array.nbytes
        self._gathered.append(_Answers(requests, output, batch.done))
        if len(self._gathered) > MOST_BATCHES or self._gathered_bytes > MOST_BYTES:
            self.work_out()
        else:
            self._owner.wake()

    def work_out(self) -> None:
        """What was predicted in the answers that have gathered. Any thread; never raises."""
        with self._lock:
            answers = [self._gathered.popleft() for _ in range(len(self._gathered))]
            self._gathered_bytes = 0
            try:
                # Outputs of free dimensions differ from batch to batch.
                for _, alike in groupby(answers, key=lambda each: each.output.shape[1]):
                    self._note(list(alike))
            except Exception:
                self._give_up()

    def _note(self, answers: Sequence[_Answers]) -> None:
        rows = answers[0].output if len(answers) == 1 else np.concatenate([each.output for each in answers])
        values, confidences = predictions(self._subject, self._classes, rows)
        start = 0
        for each in answers:
            for id, count in each.requests:
                stop = start + count
                if is_kept(id):
                    self._kept.add(id, Prediction(each.done, count, tuple(values[start:stop]), tuple(confidences[start:stop])))
                else:
                    self._unidentified += 1
                start = stop

    def close(self) -> None:
        self._is_closed = True
        self._owner.forget(self)

    def join(self, labelled: Labelled, now: float) -> tuple[str, int, str]:
        """(outcome, rows, what is wrong with it). After `work_out`."""
        with self._lock:
            found, prediction = self._kept.find(labelled.id, now)
            if prediction is None:
                return {Found.LABELLED: "duplicate", Found.EXPIRED: "expired"}.get(found, "unknown"), 0, ""
            if labelled.count != prediction.rows:
                return "invalid", 0, f"expected a label for each of {prediction.rows} rows, got {labelled.count}"
            problem = self._add(labelled, prediction)
            if problem:
                return "invalid", 0, problem
            self._kept.label(labelled.id)
            return "matched", prediction.rows, ""

    def _add(self, labelled: Labelled, prediction: Prediction) -> str:
        """Count it; or why it cannot be."""
        if not self._subject.kind.is_classification:
            if labelled.classes or labelled.names:
                return "expected values, got classes: the output is a number"
            if not all(math.isfinite(value) for value in labelled.values):
                return "expected finite values"
            # Sums with a NaN in them would say nothing ever after; headrace_nonfinite_answers_total and drift tell of such answers.
            if not all(math.isfinite(value) for value in prediction.values):
                return "the answer itself was not finite"
            if any(abs(value - label) > MOST_ERROR for value, label in zip(prediction.values, labelled.values, strict=True)):
                return f"expected values within {MOST_ERROR:g} of the answer"
            self._errors.add(prediction.values, labelled.values)
            return ""
        if labelled.values:
            return "expected classes, by index or name, got values"
        classes = list(labelled.classes) or [self._classes.index(name) for name in labelled.names]
        wrong = next((position for position, index in enumerate(classes) if index < 0), None)
        if wrong is not None:
            given = labelled.names[wrong] if classes[wrong] == UNNAMED and labelled.names else classes[wrong]
            return f"unknown class {given!r}: expected an index from 0, or one of the output's labels"
        self._right.add([int(value) for value in prediction.values], prediction.confidences, classes)
        return ""

    def report(self) -> FeedbackReport:
        """Without the answers that have gathered since `work_out`."""
        with self._lock:
            is_classes = self._subject.kind.is_classification
            right = self._right.snapshot() if is_classes else None
            seen = sorted({index for pair in right.confusion for index in pair if index >= 0}) if right is not None else []
            return FeedbackReport(
                model=self.model,
                version=self.version,
                output=self._subject.output,
                waiting_rows=self._kept.waiting_rows,
                unidentified=self._unidentified,
                replaced=self._kept.replaced,
                classification=right,
                regression=None if is_classes else self._errors.snapshot(),
                classes=tuple([(index, self._classes.name(index)) for index in seen]),
            )


class Feedbacks:
    """Owns which versions take labels, what became of labels by model, and the thread that works answers out. Any thread."""

    def __init__(self) -> None:
        self._versions: tuple[VersionFeedback, ...] = ()
        self._lock = threading.Lock()
        self._outcomes: dict[str, dict[str, int]] = {}
        self._has_work = threading.Event()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Feedbacks({len(self._versions)} versions)"

    def attach(self, version: int, effective: EffectiveModel) -> VersionFeedback | None:
        config, name = effective.config.feedback, effective.config.name
        if not config.enabled:
            return None
        try:
            subject = choose(effective.signature, config, effective.labels, effective.ranked)
        except ConfigError as error:
            # Of serving nothing depends on it.
            log.warning("feedback not taken", model=name, version=version, reason=str(error))
            return None
        made = VersionFeedback(self, name, version, effective.signature, subject, Predictions(config.keep_rows, config.keep))
        with self._lock:
            self._versions = (*self._versions, made)
            self._outcomes.setdefault(name, dict.fromkeys(OUTCOMES, 0))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="feedback", daemon=True)
                self._thread.start()
        log.info("feedback taken", model=name, version=version, output=subject.output, kind=subject.kind.value)
        return made

    def close(self) -> None:
        """End the thread. Returns at once."""
        self._is_closed.set()
        self._has_work.set()

    def wake(self) -> None:
        if not self._has_work.is_set():
            self._has_work.set()

    def _run(self) -> None:
        be_patient()
        while not self._is_closed.is_set():
            self._has_work.wait()
            self._has_work.clear()
            if self._is_closed.wait(INTERVAL):
                return
            for version in self._versions:
                version.work_out()

    def forget(self, version: VersionFeedback) -> None:
        with self._lock:
            self._versions = tuple([each for each in self._versions if each is not version])
            if not any(each.model == version.model for each in self._versions):
                self._outcomes.pop(version.model, None)

    def find(self, model: str, version: int) -> list[VersionFeedback]:
        """Those that take labels, of all versions where `version` is 0. Raises FailedPrecondition where there is none."""
        found = [each for each in self._versions if each.model == model and version in (0, each.version)]
        if not found:
            which = f"version {version} of '{model}'" if version else f"no version of '{model}' that is live"
            takes = "takes no labels, or is not live" if version else "takes labels"
            raise FailedPrecondition(f"{which} {takes}: expected enabled = true in [feedback] of its model.toml")
        return found

    def join(self, model: str, version: int, items: Sequence[Labelled]) -> Joined:
        """With the predictions of that version; of every version that has answered the request where it is 0: a shadow's too.

        Raises FailedPrecondition where no version takes labels.
        """
        versions, joined = self.find(model, version), Joined()
        for each in versions:
            each.work_out()
        now = time.monotonic()
        for item in items:
            answers = [each.join(item, now) for each in versions]
            # Of several versions most do not know the request: the one that says most counts.
            outcome, rows, problem = min(answers, key=lambda answer: _TELLING.index(answer[0]))
            joined.outcomes[outcome] += 1
            joined.rows += rows
            if problem and len(joined.problems) < MOST_PROBLEMS:
                joined.problems.append(f"request {item.id!r}: {problem}")
        with self._lock:
            counted = self._outcomes.get(model)
            if counted is not None:
                for outcome, count in joined.outcomes.items():
                    counted[outcome] += count
        return joined

    def report(self, model: str, version: int) -> list[FeedbackReport]:
        """Raises FailedPrecondition."""
        found = self.find(model, version)
        for each in found:
            each.work_out()
        return [each.report() for each in found]

    def reports(self) -> list[FeedbackReport]:
        """Of all, for a scrape on the event loop: nothing is worked out for it, which the thread does each second anyway."""
        return [each.report() for each in self._versions]

    def outcomes(self) -> dict[str, dict[str, int]]:
        """By model, of all that have a version which takes labels."""
        with self._lock:
            return {model: dict(counts) for model, counts in self._outcomes.items()}


_TELLING = ("matched", "invalid", "duplicate", "expired", "unknown")
