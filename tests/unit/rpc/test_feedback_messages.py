from __future__ import annotations

from headrace.feedback.feedbacks import FeedbackReport, Joined, Labelled
from headrace.feedback.statistics import ClassificationCounter, RegressionCounter
from headrace.rpc.feedback_messages import decode_feedback, decode_joined, decode_labelled, encode_feedback, encode_joined, encode_labelled
from headrace.wire import messages as pb


def test_reports_come_out_as_they_went_in() -> None:
    right, errors = ClassificationCounter(), RegressionCounter()
    right.add([1, 2, 2], [0.9, 0.5, 0.1], [1, 1, 2])
    errors.add([1.0, 2.5], [1.5, 2.0])
    for report in (
        FeedbackReport("m", 3, "scores", 7, 1, 2, right.snapshot(), None, ((1, "one"), (2, "two"))),
        FeedbackReport("m", 3, "price", 0, 0, 0, None, errors.snapshot()),
    ):
        assert decode_feedback(pb.FeedbackReport.FromString(encode_feedback(report).SerializeToString())) == report


def test_labels_and_what_became_of_them_come_out_as_they_went_in() -> None:
    for labelled in (Labelled("a", [1, 2], [], []), Labelled("b", [], ["x"], []), Labelled("c", [], [], [0.5])):
        assert decode_labelled(encode_labelled(labelled)) == labelled
    joined = Joined(rows=5, problems=["why"])
    joined.outcomes.update(matched=1, unknown=2, expired=3, duplicate=4, invalid=5)
    assert decode_joined(encode_joined(joined)) == joined
