"""What the page is told, of models, counters and drift, as values that a test sets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from fake_models import FakeVersion
from fake_operations import DIGITS, NOW, SENTIMENT
from headrace.config import DriftConfig
from headrace.drift.counting import Counts, Layout
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.judgement import judge
from headrace.drift.reference import FeatureReference, Reference
from headrace.drift.verdict import Alert, DriftReport
from headrace.http.dashboard.drift import MOST_WINDOWS, encode_drift
from headrace.http.dashboard.numbers import rounded
from headrace.http.dashboard.state import MOST_EVENTS, ServerState, encode_model, encode_state, sort_views
from headrace.lifecycle.events import Event
from headrace.lifecycle.state import VersionState

SERVER = ServerState("run-1", "1.0", NOW, 100.0, NOW - 60, is_live=True, is_ready=True)
AGE = FeatureReference(
    Feature(Side.INPUT, "x", "age", Kind.NUMERIC, Extract.COLUMN, 0), (30.0, 60.0), (), (400, 400, 200), minimum=18, maximum=99
)
COLOUR = FeatureReference(
    Feature(Side.INPUT, "x", "colour", Kind.CATEGORICAL, Extract.COLUMN, 1), (), ("red", "<b>blue</b>"), (500, 500, 0)
)
REFERENCE = Reference("digits", "profile", 1000, (COLOUR, AGE), left_out=("'y': too wide",), accuracy=0.9)


def counts_of(colour: tuple[int, ...], age: tuple[int, ...], **quality: int) -> Counts:
    counts, layout = Counts.zero(REFERENCE), Layout(REFERENCE)
    layout.bins(counts, 0)[:], layout.bins(counts, 1)[:] = colour, age
    layout.quality(counts, 1)[:] = [quality.get(name, 0) for name in ("missing", "infinite", "below", "above", "off_scale")]
    counts.rows = int(np.sum(age))
    return counts


def report_of(latest: Counts | None, *, windows: int = 1, **changes: Any) -> DriftReport:
    if latest is None:
        return DriftReport("digits", 3, REFERENCE, totals=Counts.zero(REFERENCE), **changes)
    verdict = judge(REFERENCE, latest, DriftConfig(), "tumbling", NOW - 10, NOW)
    history = tuple([dataclasses.replace(verdict, ended=NOW + number) for number in range(windows)])
    return DriftReport("digits", 3, REFERENCE, totals=latest, latest=latest, tumbling=verdict, history=history, **changes)


def state_of(*versions: FakeVersion, events: list[Event] | None = None) -> dict[str, Any]:
    views = sort_views(versions)
    models = [encode_model(model, views) for model in (DIGITS, SENTIMENT)]
    return dict(json.loads(json.dumps(encode_state(SERVER, models, events), allow_nan=False)))


def version_of(state: dict[str, Any], version: int) -> dict[str, Any]:
    found = [each for each in state["models"][0]["versions"] if each["version"] == version]
    assert len(found) == 1
    return dict(found[0])


def test_each_version_has_its_life_and_its_own_counters() -> None:
    three = FakeVersion("digits", 3, pending_rows=5).run(2, rows=2, padded_rows=4, seconds=0.01)
    four = FakeVersion("digits", 4).run(7, rows=21, padded_rows=21, seconds=0.01)
    state = state_of(four, three)
    found = version_of(state, 3)
    assert (found["state"], found["labels"], found["traffic"], found["is_default"]) == ("live", ["stable"], 90.0, True)
    assert (found["counters"]["success"], found["counters"]["rows"], found["counters"]["padding"]) == (2, 2, 2)
    assert found["waiting_rows"] == 5
    assert version_of(state, 4)["counters"]["rows"] == 21
    assert version_of(state, 5)["reason"].startswith("model.onnx: sha256 differs")
    assert version_of(state, 5)["counters"] is None
    assert state["models"][0]["rollout"]["candidate"] == 4
    assert state["models"][1]["error"] == "no version has a model.onnx"


def test_histograms_fit_the_edges_that_come_with_them() -> None:
    state = state_of(FakeVersion("digits", 3).run(2, rows=2, padded_rows=2, seconds=0.01))
    counters = version_of(state, 3)["counters"]
    assert len(counters["buckets"]) == len(state["stages"])
    assert {len(buckets) for buckets in counters["buckets"]} == {len(state["seconds"]) + 1}
    assert len(counters["batch_buckets"]) == len(state["rows"]) + 1
    compute = counters["buckets"][state["stages"].index("compute")]
    assert state["seconds"][compute.index(2)] == 0.0075  # 7 ms of 10


def test_a_version_that_left_between_two_looks_has_no_counters() -> None:
    state = state_of(FakeVersion("digits", 3, VersionState.UNLOADED).run(1, rows=1, padded_rows=1, seconds=0.01))
    assert version_of(state, 3)["counters"] is None


def test_two_copies_of_one_version_do_not_share_counters() -> None:
    copies = [dataclasses.replace(DIGITS.versions[0], token=token) for token in ("old", "new")]
    model = dataclasses.replace(DIGITS, versions=tuple(copies))
    views = [FakeVersion("digits", 3).run(count, rows=count, padded_rows=count, seconds=0.01) for count in (1, 2)]
    versions = encode_model(model, sort_views(views))["versions"]
    assert [(each["id"], each["counters"]["success"]) for each in versions] == [("3@old", 1), ("3@new", 2)]


def test_events_come_newest_first_and_bounded_or_not_at_all() -> None:
    events = [Event(number, NOW, "live", "digits") for number in range(1, MOST_EVENTS + 50)]
    numbers = [event["number"] for event in state_of(events=events)["events"]]
    assert (numbers[0], len(numbers)) == (MOST_EVENTS + 49, MOST_EVENTS)
    assert state_of()["events"] is None


def test_a_reference_that_is_learnt_says_how_far_it_is() -> None:
    report = DriftReport("digits", 3, None, learnt_rows=1200, learn_rows=2000, seen_rows=1200)
    drift = version_of(state_of(FakeVersion("digits", 3, drift=report)), 3)["drift"]
    assert (drift["status"], drift["learnt_rows"], drift["learn_rows"], drift["reference"]) == ("learning", 1200, 2000, None)
    assert encode_drift(report)["features"] == []


def test_before_the_first_window_it_waits_and_then_it_is_calm() -> None:
    calm = report_of(counts_of((500, 500, 0), (400, 400, 200)))
    drifts = [version_of(state_of(FakeVersion("digits", 3, drift=each)), 3)["drift"] for each in (report_of(None), calm)]
    assert [drift["status"] for drift in drifts] == ["waiting", "calm"]
    assert drifts[1]["window"]["excess"] < 1
    assert drifts[1]["reference"]["rows"] == 1000


def test_what_drifts_comes_first_with_its_bins_and_problems() -> None:
    alert = Alert(NOW, "digits", 3, "drift", "x.age", "input", True, "psi", 1.0, 0.02, 1000, 9.0, "x.age drifted")
    report = report_of(counts_of((500, 480, 20), (0, 100, 900), above=30, missing=2), alerts=(alert,), past_alerts=(alert,))
    assert version_of(state_of(FakeVersion("digits", 3, drift=report)), 3)["drift"]["status"] == "alert"
    encoded = encode_drift(report)
    age, colour = encoded["features"]
    assert (age["key"], age["is_raised"], age["is_drifting"], colour["is_raised"]) == ("input/x.age", True, True, False)
    assert age["excess"] > 10
    assert (age["expected"], age["live"], age["edges"]) == ([0.4, 0.4, 0.2], [0.0, 0.1, 0.9], [30.0, 60.0])
    assert age["quality"] == {"missing": 2, "above": 30}
    assert (colour["labels"], colour["quality"], colour["edges"]) == (["red", "<b>blue</b>", "others"], {"unseen": 20}, None)
    assert [each["text"] for each in encoded["alerts"]] == ["x.age drifted"]
    assert encoded["left_out"] == ("'y': too wide",)


def test_history_is_bounded_and_of_the_same_windows_for_all() -> None:
    encoded = encode_drift(report_of(counts_of((500, 500, 0), (400, 400, 200)), windows=MOST_WINDOWS + 20))
    assert [window["ended"] for window in encoded["windows"]] == [NOW + 20 + number for number in range(MOST_WINDOWS)]
    assert {len(feature["history"]) for feature in encoded["features"]} == {MOST_WINDOWS}


def test_numbers_that_json_lacks_become_none() -> None:
    assert [rounded(value) for value in (float("inf"), float("nan"), 0.123456789, 1234567.0)] == [None, None, 0.12346, 1234600.0]
