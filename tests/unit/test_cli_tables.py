from __future__ import annotations

import dataclasses
import io

import pytest
from fake_operations import DIGITS, NOW, SENTIMENT
from headrace.cli_tables import event_line, event_table, model_page, model_table, printable, size, source_table, span
from headrace.lifecycle.events import Event
from headrace.lifecycle.view import SourceDescription
from rich.console import Console, RenderableType


def render(content: RenderableType, width: int = 100, *, is_terminal: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=is_terminal, color_system="standard" if is_terminal else None, highlight=False).print(
        content
    )
    return out.getvalue()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_list_has_a_row_a_version_and_every_reason_in_full() -> None:
    text = render(model_table([DIGITS, SENTIMENT], NOW))
    assert rows(text) == [
        ["model", "version", "state", "labels", "traffic", "requests", "since"],
        ["digits", "3", "live", "stable", "90", "%", "123,456", "3", "d", "ago"],
        ["digits", "4", "live", "canary", "canary", "10", "%", "80", "2", "min", "ago"],
        ["digits", "5", "failed", "20", "s", "ago"],
        ["sentiment", "-", "error"],
        [],
        ["digits:5", "failed:", *DIGITS.versions[2].reason.split()],
        ["sentiment", "error:", *SENTIMENT.error.split()],
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_nothing_is_cut_off_whatever_the_width(width: int) -> None:
    reason = " ".join(f"word{number}" for number in range(60))
    failed = dataclasses.replace(DIGITS.versions[2], reason=reason)
    text = render(model_table([dataclasses.replace(DIGITS, versions=(failed,))], NOW), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert [word for word in text.split() if word.startswith("word")] == reason.split()
    assert "…" not in text


def test_colour_says_what_the_word_says() -> None:
    coloured, plain = (render(model_table([DIGITS], NOW), is_terminal=terminal) for terminal in (True, False))
    assert "\x1b[32mlive" in coloured
    assert "\x1b[31mfailed" in coloured
    assert "\x1b" not in plain


def test_a_page_has_everything_that_is_known() -> None:
    history = [Event(7, NOW, "rollout", "digits", 4, "deploy-bot", "try it", {"mode": "canary"})]
    text = render(model_page(DIGITS, history, NOW))
    for known in (
        "/srv/models", "latest:2", "canary=4, stable=3", "version 3 (default)", "3 d ago", "123,456, 7 failed", "1.25 s", "42 MiB", "a1b2",
        "9f" * 32, "git=8ab30a4, run=417", "sha256 differs", "running", "canary, 10 % of the requests", "4 on trial against 3",
        "80 of at least 100", "at least 2 min left", "deploy-bot", "try it; mode=canary",
    ):  # fmt: skip
        assert known in text
    assert ["error", "rate", "0.00", "%", "0.01", "%"] in rows(text)


def test_no_models_and_no_sources_are_said_to_be_none() -> None:
    assert render(model_table([], NOW)) == "no models\n"
    assert render(source_table([])).startswith("no sources are watched")


def test_sources_show_what_is_wrong() -> None:
    text = render(source_table([SourceDescription("/srv/models", 1.5), SourceDescription("s3://m", 4000.0, "connection refused")]))
    assert rows(text)[1:] == [["/srv/models", "ok", "2", "s", "ago"], ["s3://m", "error", "1", "h", "ago", "connection", "refused"]]


def test_an_event_is_one_line_with_who_and_why() -> None:
    event = Event(7, NOW, "promoted", "digits", 4, "deploy-bot", "it is\ngood", {"from": "3", "digest": "9f" * 32})
    text = render(event_line(event, missed=0), width=500)
    assert text.count("\n") == 1
    assert text.split()[2:] == ["promoted", "digits:4", "by", "deploy-bot", "it", "is", "good;", "from=3"]
    assert "5 events were lost here" in render(event_line(event, missed=5), width=500)
    assert "by" not in render(event_line(Event(1, NOW, "live", "digits"), missed=0)).split()


def test_what_others_wrote_is_text_and_steers_nothing() -> None:
    nasty = "[bold]x[/bold] \x1b[2J\x07\u202e"
    event = Event(1, NOW, "promoted", "digits", 4, nasty, nasty, {nasty: nasty})
    model = dataclasses.replace(SENTIMENT, name=nasty, error=nasty, source=nasty)
    for content in (event_line(event, 0), event_table([event]), model_table([model], NOW), model_page(model, [event], NOW)):
        text = render(content, 500)
        assert printable(text.replace("\n", "")) == text.replace("\n", "")
        assert "[bold]x[/bold]" in text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (7200, "2 h"), (86400 * 400, "400 d")])
def test_spans_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (2048, "2 KiB"), (3 << 20, "3 MiB"), (5 << 29, "2.5 GiB")])
def test_sizes_are_in_their_largest_unit(count: int, text: str) -> None:
    assert size(count) == text
