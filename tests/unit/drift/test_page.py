from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from headrace.drift.page import render
from headrace.drift.ranking import rank
from headrace.drift.verdict import DriftReport
from watched_versions import CLEAN, DRIFTED, report

VOID = {"meta", "input"}


class Checker(HTMLParser):
    """That what has to be closed is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag in {"svg", "figure", "ul", "table", "div", "body", "html", "title", "style"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"svg", "figure", "ul", "table", "div", "body", "html", "title", "style"}:
            assert self.open.pop() == tag


def parse(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_the_worst_features_come_first_and_those_with_alerts_before_all() -> None:
    ranked = rank(report(DRIFTED))
    raised = [each.is_raised for each in ranked]
    assert raised == sorted(raised, reverse=True)
    assert any(raised)
    calm = [each.excess for each in ranked if not each.is_raised]
    assert calm == sorted(calm, reverse=True)
    assert all(sum(each.live) == pytest.approx(1) and sum(each.expected) == pytest.approx(1) for each in ranked)
    assert len(ranked[0].history) == len(DRIFTED)


def test_a_page_has_every_alert_and_feature_and_needs_nothing_else() -> None:
    given = report(DRIFTED)
    page = render(given, 1.8e9)
    checker = parse(page)
    assert checker.count["tr"] == len(rank(given)) + 1
    assert checker.count["li"] == len(given.alerts)
    for alert in given.alerts:
        assert alert.text in page
    assert not re.search(r"(src|href)=|https?://|<script", page)
    assert "2027-01-15 08:00:00 UTC" in page


def test_a_page_without_drift_says_so_and_one_while_learning_how_far_that_is() -> None:
    assert "No alert." in render(report(CLEAN), 0.0)
    page = render(DriftReport("m", 1, None, learnt_rows=300, learn_rows=2000), 0.0)
    parse(page)
    assert "300 of 2,000 rows" in page


def test_names_from_elsewhere_are_text() -> None:
    given = report(DRIFTED)
    assert given.reference is not None
    first, *rest = given.reference.features
    evil = replace(first, feature=replace(first.feature, name="<script>alert(1)</script>'\""))
    page = render(replace(given, model="<b>m", reference=replace(given.reference, features=(evil, *rest))), 0.0)
    assert "<script" not in page
    assert "<b>m" not in page
    parse(page)
