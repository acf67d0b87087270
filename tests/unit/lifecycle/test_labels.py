from __future__ import annotations

import pytest
from headrace.errors import FailedPrecondition
from headrace.lifecycle.labels import Labels


def test_a_label_waits_until_its_version_is_live_and_stays_where_it_is_until_then() -> None:
    labels = Labels()
    labels.configure({"stable": 1})
    assert labels.settle({}) == []
    assert labels.settle({1}) == [("stable", 0, 1)]
    labels.configure({"stable": 2})
    assert labels.settle({1}) == []
    assert (labels.current, labels.versions) == ({"stable": 1}, {1, 2})
    assert labels.settle({1, 2}) == [("stable", 1, 2)]
    assert labels.versions == {2}


def test_a_label_whose_version_is_gone_names_nothing() -> None:
    labels = Labels()
    labels.configure({"stable": 1})
    labels.settle({1})
    assert labels.settle({}) == [("stable", 1, 0)]
    assert labels.current == {}


def test_an_operator_moves_labels_to_live_versions_only() -> None:
    labels = Labels()
    with pytest.raises(FailedPrecondition, match="label 'canary': expected a live version, got 3; live: 1, 2"):
        labels.move("canary", 3, [2, 1])
    labels.move("canary", 2, [1, 2])
    assert labels.settle({1, 2}) == [("canary", 0, 2)]
    labels.move("canary", 0, [1, 2])
    assert labels.settle({1, 2}) == [("canary", 2, 0)]


def test_an_operators_move_stays_until_the_configuration_says_something_new() -> None:
    labels = Labels()
    labels.configure({"stable": 1})
    labels.settle({1, 2, 3})
    labels.move("stable", 2, {1, 2, 3})
    labels.configure({"stable": 1})
    labels.settle({1, 2, 3})
    assert labels.current == {"stable": 2}
    labels.configure({"stable": 3})
    labels.settle({1, 2, 3})
    assert labels.current == {"stable": 3}
    labels.configure({})
    labels.settle({1, 2, 3})
    assert labels.current == {}
