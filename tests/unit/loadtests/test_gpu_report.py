from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests import gpu_check, gpu_report
from loadtests.gpu_device import KernelsUnavailable, find_device
from loadtests.gpu_report import Report, as_html, as_text, failed_checks, run_section


@pytest.fixture(scope="module")
def no_gpu() -> None:
    try:
        find_device()
    except KernelsUnavailable:
        return
    pytest.skip("there is a GPU: what happens without one cannot be shown")


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "section_good.py").write_text(
        "def run(report):\n"
        "    return {'seed': report.seed, 'facts': {'a': '<b>'}, 'before': report.earlier,\n"
        "            'checks': [{'what': 'is right', 'passed': False, 'got': 3}, {'what': 'other', 'passed': None, 'got': 'not run'}],\n"
        "            'tables': [{'title': 'times', 'rows': [{'kernel': 'k', 'fraction': 0.9}]}]}\n"
    )
    (tmp_path / "section_bad.py").write_text("def run(report):\n    raise RuntimeError('the context is gone')\n")
    (tmp_path / "section_killed.py").write_text("import os\n\ndef run(report):\n    os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("main", [gpu_report.main, gpu_check.main])
def test_without_a_gpu_it_says_so_and_exits_1(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("sections")
def test_a_section_runs_in_its_own_process_with_what_came_before() -> None:
    section = run_section("good", "section_good", Report(seed=7, earlier={"machine": {"copy_rate": 1e12}}))
    assert section["status"] == "done"
    assert section["result"]["seed"] == 7
    assert section["result"]["before"] == {"machine": {"copy_rate": 1e12}}


@pytest.mark.usefixtures("sections")
@pytest.mark.parametrize(("module", "reason"), [("section_bad", "the context is gone"), ("section_killed", "exit code -6")])
def test_a_section_that_fails_is_reported(module: str, reason: str) -> None:
    section = run_section("bad", module, Report())
    assert section["status"] == "failed"
    assert reason in section["reason"]


def test_a_section_that_is_missing_is_reported_and_no_failure() -> None:
    section = run_section("other", "loadtests.gpu_no_such_section", Report())
    assert section["status"] == "not there"
    assert failed_checks({"other": section}) == []


@pytest.mark.usefixtures("sections")
def test_the_report_shows_checks_tables_and_failures_and_escapes_them() -> None:
    found = {"good": run_section("good", "section_good", Report()), "bad": run_section("bad", "section_bad", Report())}
    assert json.loads(json.dumps(found)) == found
    failures = failed_checks(found)
    assert len(failures) == 2
    assert "is right: got 3" in failures[1]
    for text in (as_text(found), as_html(found)):
        assert "FAILED" in text
        assert "not run" in text
        assert "0.9" in text
        assert "the context is gone" in text
    assert "&lt;b&gt;" in as_html(found)
    assert "http" not in as_html(found)


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(["--sections", "machine,kernel"])
    assert "kernel" in capsys.readouterr().err
