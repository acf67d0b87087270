"""Labels and what they have shown, to the messages of headrace.v1 and back."""

from __future__ import annotations

from headrace.feedback.feedbacks import FeedbackReport, Joined, Labelled
from headrace.feedback.statistics import CalibrationBin, Classification, Regression
from headrace.wire import messages as pb

_BIN = ("lower", "upper", "rows", "confidence", "accuracy")
_REGRESSION = ("rows", "error", "absolute", "squared", "recent_rows", "recent_absolute")


def encode_labelled(labelled: Labelled) -> pb.LabelledRequest:
    return pb.LabelledRequest(request_id=labelled.id, classes=labelled.classes, names=labelled.names, values=labelled.values)


def decode_labelled(message: pb.LabelledRequest) -> Labelled:
    return Labelled(message.request_id, message.classes[:], message.names[:], message.values[:])


def encode_joined(joined: Joined) -> pb.SendFeedbackResponse:
    return pb.SendFeedbackResponse(**joined.outcomes, matched_rows=joined.rows, problems=joined.problems)


def decode_joined(message: pb.SendFeedbackResponse) -> Joined:
    joined = Joined(rows=message.matched_rows, problems=list(message.problems))
    joined.outcomes = {outcome: getattr(message, outcome) for outcome in joined.outcomes}
    return joined


def encode_feedback(report: FeedbackReport) -> pb.FeedbackReport:
    right, errors = report.classification, report.regression
    return pb.FeedbackReport(
        model=report.model,
        version=report.version,
        output=report.output,
        waiting_rows=report.waiting_rows,
        unidentified=report.unidentified,
        replaced=report.replaced,
        classification=None if right is None else _encode_classification(right),
        regression=None if errors is None else pb.RegressionFeedback(**{name: getattr(errors, name) for name in _REGRESSION}),
        classes=dict(report.classes),
    )


def _encode_classification(right: Classification) -> pb.ClassificationFeedback:
    return pb.ClassificationFeedback(
        rows=right.rows,
        correct=right.correct,
        recent_rows=right.recent_rows,
        recent_correct=right.recent_correct,
        calibration_error=right.calibration_error,
        bins=[pb.CalibrationBin(**{name: getattr(each, name) for name in _BIN}) for each in right.bins],
        confusion=[
            pb.ConfusionCount(label=label, predicted=predicted, rows=rows) for (label, predicted), rows in sorted(right.confusion.items())
        ],
    )


def decode_feedback(message: pb.FeedbackReport) -> FeedbackReport:
    return FeedbackReport(
        model=message.model,
        version=message.version,
        output=message.output,
        waiting_rows=message.waiting_rows,
        unidentified=message.unidentified,
        replaced=message.replaced,
        classification=_decode_classification(message.classification) if message.HasField("classification") else None,
        regression=Regression(**{name: getattr(message.regression, name) for name in _REGRESSION})
        if message.HasField("regression")
        else None,
        classes=tuple(sorted(message.classes.items())),
    )


def _decode_classification(message: pb.ClassificationFeedback) -> Classification:
    return Classification(
        rows=message.rows,
        correct=message.correct,
        recent_rows=message.recent_rows,
        recent_correct=message.recent_correct,
        calibration_error=message.calibration_error,
        bins=tuple([CalibrationBin(**{name: getattr(each, name) for name in _BIN}) for each in message.bins]),
        confusion={(each.label, each.predicted): each.rows for each in message.confusion},
    )
