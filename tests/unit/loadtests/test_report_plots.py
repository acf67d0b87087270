import re
from itertools import pairwise

import pytest

from loadtests.report_plots import Plot, Point, Series, complementary_distribution, draw, short_number, spread_apart, standalone
from loadtests.statistics import Spread


def plot(*names: str, has_diagonal: bool = False) -> Plot:
    points = [Point(1, Spread(10.0, 9.0, 12.0)), Point(16, Spread(100.0, 80.0, 110.0))]
    series = [Series(name, points) for name in names]
    return Plot("rates-mlp", 'of "a" & b', "calls", "requests/s", series, has_log_x=True, has_log_y=True, has_diagonal=has_diagonal)


def test_every_series_is_drawn_and_named() -> None:
    svg = draw(plot("ours", "theirs"), {"ours": 0, "theirs": 1})
    assert {"rates-mlp-ours", "rates-mlp-theirs"} <= set(re.findall(r'id="([^"]+)"', svg))
    assert re.findall(r">\s*(ours|theirs)\s*</text>", svg) == ["ours", "theirs"]


def test_the_ideal_line_is_drawn_where_it_is_asked_for() -> None:
    assert 'id="rates-mlp-ideal"' in draw(plot("ours", has_diagonal=True), {"ours": 0})
    assert 'id="rates-mlp-ideal"' not in draw(plot("ours"), {"ours": 0})


def test_axes_have_their_units_and_ink_is_the_pages() -> None:
    svg = draw(plot("ours"), {"ours": 0})
    assert ">calls</text>" in svg
    assert ">requests/s</text>" in svg
    assert "#010203" not in svg
    assert "currentColor" in svg


def test_a_picture_needs_nothing_from_elsewhere_and_its_title_is_escaped() -> None:
    svg = draw(plot("ours"), {"ours": 0})
    assert svg.startswith('<svg role="img" aria-label="of &quot;a&quot; &amp; b"')
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script|<metadata', svg)


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert draw(plot("ours"), {"ours": 0}) == draw(plot("ours"), {"ours": 0})


def test_a_file_of_its_own_sets_the_colour_for_both_grounds() -> None:
    assert standalone(draw(plot("ours"), {"ours": 0})).count("prefers-color-scheme:dark") == 1


@pytest.mark.parametrize("wanted", [[0.5, 0.5, 0.5], [0.9, 0.1, 0.12, 0.11], [0.3], []])
def test_labels_are_moved_apart_and_keep_their_order(wanted: list[float]) -> None:
    placed = spread_apart(wanted, 0.1)
    inside = sorted(placed)
    assert all(high - low >= 0.1 - 1e-9 for low, high in pairwise(inside))
    assert sorted(range(len(wanted)), key=lambda index: wanted[index]) == sorted(range(len(wanted)), key=lambda index: placed[index])


def test_a_label_with_room_stays_where_it_is() -> None:
    assert spread_apart([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])


def test_distribution_counts_those_that_take_longer() -> None:
    assert complementary_distribution([1.0, 2.0, 3.0, 4.0], [6, 0, 3]) == [(2.0, pytest.approx(1 / 3))]
    assert complementary_distribution([1.0, 2.0, 3.0], [0, 0]) == []


@pytest.mark.parametrize(("edges", "said"), [([1.0, 2.0], "one edge more"), ([1.0, 3.0, 2.0], "rise")])
def test_a_histogram_that_is_none_is_refused(edges: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        complementary_distribution(edges, [1, 2])


@pytest.mark.parametrize(("value", "text"), [(20_000, "20k"), (1.5e6, "1.5M"), (0.05, "0.05"), (0, "0")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
