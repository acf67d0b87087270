import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import report
from loadtests.comparison import Cell, Report, as_json
from loadtests.report import Section, page, section


def comparison(*rates: float, failures: tuple[str, ...] = ()) -> str:
    cells = [
        Cell(number, name, "mlp", concurrency, 1000, rate * factor, 0.001, 0.002, 50.0, 4.0, 0.2)
        for number, rate in enumerate(rates)
        for name, factor in (("headrace-native", 1.0), ("echo-native", 2.0), ("triton", 0.5))
        for concurrency in (1, 16)
    ]
    return as_json(Report({"cpu": "<fast>"}, {"rounds": 2}, cells, failures=[*failures], command="python -m loadtests.compare"))


def result(directory: Path, name: str, content: str) -> Path:
    (directory / name).write_text(content)
    return directory / name


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return report.main()


def shown(content: dict[str, Any]) -> str:
    return page("t", [section("a.json", content)])


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = shown(json.loads(comparison(100.0, 110.0)))
    assert html.count("<svg ") == 5
    assert not re.search(r'(src|href)\s*=\s*"(?!#)|url\((?!#)|@import|<script|<link', html)


def test_the_page_has_pictures_tables_conditions_and_command() -> None:
    html = shown(json.loads(comparison(100.0, 110.0, failures=("round 1: <gone>",))))
    assert {"rates-mlp-headrace-native", "rates-mlp-echo-native", "echo-mlp-headrace-native", "ratios-mlp-headrace-native"} <= set(
        re.findall(r'id="([^"]+)"', html)
    )
    for text in ("<td>105 (100-110)</td>", "<dd>&lt;fast&gt;</dd>", "<code>python -m loadtests.compare</code>", "round 1: &lt;gone&gt;"):
        assert text in html


def test_an_unknown_kind_is_skipped_with_a_sentence() -> None:
    assert "Skipped: its kind is &#x27;simulator&#x27;" in shown({"kind": "simulator"})


def test_a_result_that_lacks_something_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 'facts'"):
        section("a.json", {"kind": "compare", "cells": [], "references": []})


def test_a_result_from_before_there_were_kinds_is_shown() -> None:
    content = json.loads(comparison(100.0))
    del content["kind"]
    assert section("a.json", content).plots


def test_a_section_without_pictures_is_a_page() -> None:
    assert "<p>nothing</p>" in page("t", [Section("empty", [], sentence="nothing")])


def test_page_pictures_and_table_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = result(tmp_path, "a.json", comparison(100.0, 110.0))
    assert run(monkeypatch, measured, "--out", tmp_path / "r.html", "--pictures", tmp_path / "p", "--table", tmp_path / "t.md") == 0
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert {path.name for path in (tmp_path / "p").iterdir()} == {f"{key}-mlp.svg" for key in ("rates", "ratios", "echo", "cpu", "closed")}
    assert "| headrace-native | 105 (100-110)    | 105 (100-110)    | 50.0 " in (tmp_path / "t.md").read_text()


def test_two_results_are_compared_by_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before, after = result(tmp_path, "a.json", comparison(100.0, 105.0, 110.0)), result(tmp_path, "b.json", comparison(60.0, 63.0, 66.0))
    assert run(monkeypatch, "--compare", before, after, "--out", tmp_path / "r.html") == 1
    assert "worse" in capsys.readouterr().out
    assert '<td class="worse">worse</td>' in (tmp_path / "r.html").read_text()
    assert run(monkeypatch, "--compare", after, before) == 0


def test_a_file_that_is_no_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, result(tmp_path, "a.json", "[]")) == 2
    assert "a.json: expected the JSON of a result, got a list" in capsys.readouterr().err
