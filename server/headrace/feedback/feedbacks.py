"""Labels joined with what was predicted: one part in each version that takes them, found by model and request id.

What was predicted is noted on the thread that ran the batch, right after the answers have left, and not handed to another one: a client
may send its label as soon as it has its answer, and would be told that nobody knows the request. It costs the batch some 10 µs and
2 µs a request (docs/operations.md), and is off unless model.toml has it on.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.batching.observer import RanBatch
from headrace.errors import ConfigError, FailedPrecondition
from headrace.feedback.predictions import Found, Prediction, Predictions, is_kept
from headrace.feedback.statistics import Classification, ClassificationCounter, Regression, RegressionCounter
from headrace.feedback.subject import UNNAMED, ClassNames, Subject, choose, predictions
from headrace.lifecycle.effective import EffectiveModel
from headrace.signature import Signature
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

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
        self._is_closed = False

    def __repr__(self) -> str:
        return f"VersionFeedback({self.model}:{self.version}, {self._subject.output}, {self._kept!r})"

    def look(self, batch: RanBatch) -> None:
        if self._is_closed:
            return
        try:
            self._note(batch)
        except Exception:
            self._is_closed = True
            log.exception("feedback failed and stops", model=self.model, version=self.version)

    def _note(self, batch: RanBatch) -> None:
        wanted = [is_kept(ticket.id) and self._index in ticket.outputs for ticket in batch.tickets]
        if not any(wanted):
            with self._lock:
                self._unidentified += len(wanted)
            return
        array = batch.arrays[batch.outputs.index(self._subject.output)]
        rows = array[: batch.rows].reshape(batch.rows, -1) if self._is_batching else array.reshape(1, -1)
        with self._lock:
            values, confidences = predictions(self._subject, self._classes, rows)
            now, start = time.monotonic(), 0
            for ticket, is_wanted in zip(batch.tickets, wanted, strict=True):
                stop = start + ticket.rows
                if is_wanted:
                    mine = Prediction(now, ticket.rows, tuple(values[start:stop]), tuple(confidences[start:stop]))
                    self._kept.add(ticket.id, mine)
                else:
                    self._unidentified += 1
                start = stop

    def close(self) -> None:
        self._is_closed = True
        self._owner.forget(self)

    def join(self, labelled: Labelled, now: float) -> tuple[str, int, str]:
        """(outcome, rows, what is wrong with it)"""
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
    """Owns which versions take labels, and what became of labels by model. Any thread."""

    def __init__(self) -> None:
        self._versions: tuple[VersionFeedback, ...] = ()
        self._lock = threading.Lock()
        self._outcomes: dict[str, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"Feedbacks({len(self._versions)} versions)"

    def attach(self, version: int, effective: EffectiveModel) -> VersionFeedback | None:
        config, name = effective.config.feedback, effective.config.name
        if not config.enabled:
            return None
        try:
            subject = choose(effective.signature, config, effective.labels)
        except ConfigError as error:
            # Of serving nothing depends on it.
            log.warning("feedback not taken", model=name, version=version, reason=str(error))
            return None
        made = VersionFeedback(self, name, version, effective.signature, subject, Predictions(config.keep_rows, config.keep))
        with self._lock:
            self._versions = (*self._versions, made)
            self._outcomes.setdefault(name, dict.fromkeys(OUTCOMES, 0))
        log.info("feedback taken", model=name, version=version, output=subject.output, kind=subject.kind.value)
        return made

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
        versions, joined, now = self.find(model, version), Joined(), time.monotonic()
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
        return [each.report() for each in self.find(model, version)]

    def reports(self) -> list[FeedbackReport]:
        return [each.report() for each in self._versions]

    def outcomes(self) -> dict[str, dict[str, int]]:
        """By model, of all that have a version which takes labels."""
        with self._lock:
            return {model: dict(counts) for model, counts in self._outcomes.items()}


_TELLING = ("matched", "invalid", "duplicate", "expired", "unknown")
