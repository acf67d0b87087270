from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from headrace.drift.counting import Counts
from headrace.drift.reference import Calibration
from headrace.drift.verdict import DriftReport
from headrace.rpc.drift_messages import decode_report, encode_report
from headrace.wire import messages as pb
from watched_versions import DRIFTED, report


def there_and_back(given: DriftReport, windows: int = 0) -> DriftReport:
    return decode_report(pb.DriftReport.FromString(encode_report(given, windows).SerializeToString()))


def assert_same(a: DriftReport, b: DriftReport) -> None:
    if a.totals is None or b.totals is None:
        assert a.totals is b.totals
    else:
        for field in fields(Counts):
            np.testing.assert_array_equal(getattr(a.totals, field.name), getattr(b.totals, field.name))
    if a.latest is None or b.latest is None:
        assert a.latest is b.latest
    else:
        for name in ("bins", "sums", "squares", "rows"):
            np.testing.assert_array_equal(getattr(a.latest, name), getattr(b.latest, name))
    slow = [{index: value for index, value in each.slow.items() if value} for each in (a, b)]
    assert slow[0] == slow[1]
    assert replace(a, totals=None, latest=None, slow={}) == replace(b, totals=None, latest=None, slow={})


def test_a_report_comes_out_as_it_went_in() -> None:
    given = report(DRIFTED)
    assert given.alerts
    assert given.latest is not None
    assert given.reference is not None
    calibrated = replace(given.reference, calibration=Calibration("scores", (0.5, 0.9), (0.4, 0.8, 0.95), 100), accuracy=0.9, digest="d")
    for each in (given, replace(given, reference=calibrated)):
        assert_same(there_and_back(each), each)


@pytest.mark.parametrize("given", [DriftReport("m", 1, None, learnt_rows=3, learn_rows=2000, seen_rows=3), DriftReport("m", 0, None)])
def test_a_report_of_a_version_that_still_learns_has_no_reference(given: DriftReport) -> None:
    assert_same(there_and_back(given), given)


def test_before_any_row_was_counted_all_counts_are_zero() -> None:
    found = there_and_back(report(()))
    assert found.totals is not None
    assert (found.totals.rows, found.totals.bins.sum()) == (0, 0)
    assert found.tumbling is None


def test_the_latest_windows_are_those_that_come() -> None:
    given = report(DRIFTED)
    assert there_and_back(given, 2).history == given.history[-2:]
    assert there_and_back(given, 100).history == given.history
