from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from headrace.config import FeedbackConfig
from headrace.errors import FailedPrecondition
from headrace.feedback import feedbacks as module
from headrace.feedback.feedbacks import Feedbacks, Labelled, VersionFeedback
from ran_batches import model, ran

WANTED = model(feedback=FeedbackConfig(True))
SECOND = np.array([[0.1, 0.8, 0.1]])


@pytest.fixture
def feedbacks() -> Iterator[Feedbacks]:
    made = Feedbacks()
    yield made
    made.close()


def attach(feedbacks: Feedbacks, version: int = 1) -> VersionFeedback:
    made = feedbacks.attach(version, WANTED)
    assert made is not None
    return made


def correct(version: VersionFeedback) -> tuple[int, int]:
    right = version.report().classification
    assert right is not None
    return right.rows, right.correct


def test_labels_of_rows_that_shared_a_batch_go_to_their_own_request(feedbacks: Feedbacks) -> None:
    version = attach(feedbacks)
    scores = np.eye(3)[[0, 1, 2, 2, 1, 0]]
    version.look(ran(scores, ["a", "", "b"], [2, 1, 3]))
    joined = feedbacks.join("m", 0, [Labelled("b", classes=[2, 1, 0]), Labelled("a", classes=[0, 0])])
    assert (joined.outcomes["matched"], joined.rows) == (2, 5)
    assert correct(version) == (5, 4)
    assert version.report().unidentified == 1


def test_labels_without_a_version_count_for_all_that_answered_as_a_shadow_does(feedbacks: Feedbacks) -> None:
    live, shadow = attach(feedbacks, 1), attach(feedbacks, 2)
    live.look(ran(SECOND, ["a"]))
    shadow.look(ran(SECOND[:, ::-1] * [1, 0.1, 2], ["a"]))
    live.look(ran(SECOND, ["live alone"]))
    assert feedbacks.join("m", 0, [Labelled("a", classes=[1]), Labelled("live alone", classes=[1])]).outcomes["matched"] == 2
    assert [correct(each) for each in (live, shadow)] == [(2, 2), (1, 0)]
    assert feedbacks.outcomes() == {"m": {"matched": 2, "unknown": 0, "expired": 0, "duplicate": 0, "invalid": 0}}


def test_a_version_that_is_asked_for_is_the_only_one(feedbacks: Feedbacks) -> None:
    first, second = attach(feedbacks, 1), attach(feedbacks, 2)
    for version in (first, second):
        version.look(ran(SECOND, ["a"]))
    feedbacks.join("m", 2, [Labelled("a", classes=[1])])
    assert [correct(each)[0] for each in (first, second)] == [0, 1]
    second.close()
    with pytest.raises(FailedPrecondition, match="version 2 of 'm' takes no labels, or is not live"):
        feedbacks.join("m", 2, [])


def test_what_has_gathered_is_bounded_and_none_of_it_is_lost(feedbacks: Feedbacks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BATCHES", 10)
    version = attach(feedbacks)
    for number in range(100):
        version.look(ran(SECOND, [str(number)]))
        assert len(version._gathered) <= 11
    assert feedbacks.join("m", 0, [Labelled(str(number), classes=[1]) for number in range(100)]).outcomes["matched"] == 100


def test_an_answer_without_elements_has_no_label_and_the_next_ones_have(feedbacks: Feedbacks) -> None:
    version = attach(feedbacks)
    version.look(ran(np.zeros((1, 0)), ["a"]))
    version.look(ran(SECOND, ["b"]))
    joined = feedbacks.join("m", 0, [Labelled(id, classes=[1]) for id in "ab"])
    assert (joined.outcomes["unknown"], joined.outcomes["matched"]) == (1, 1)
    assert version.report().unidentified == 1


def test_a_batch_that_cannot_be_read_ends_feedback_and_no_request(feedbacks: Feedbacks) -> None:
    version = attach(feedbacks)
    version.look(ran(SECOND, ["a"])._replace(arrays=[np.zeros(())]))
    version.look(ran(SECOND, ["b"]))
    assert feedbacks.join("m", 0, [Labelled("a", classes=[1])]).outcomes["unknown"] == 1
    version.look(ran(SECOND, ["c"]))
    assert feedbacks.join("m", 0, [Labelled("c", classes=[1])]).outcomes["unknown"] == 1


def test_a_model_that_does_not_want_it_has_no_part(feedbacks: Feedbacks) -> None:
    assert feedbacks.attach(1, model()) is None
    with pytest.raises(FailedPrecondition, match="no version of 'm' that is live takes labels"):
        feedbacks.report("m", 0)
