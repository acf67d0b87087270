from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx_models
import pytest
from headrace import cli
from headrace.bench import runs
from headrace.bench.choice import Sample
from headrace.bench.trial import Trial
from headrace.config_loading import load_model_toml

TEXT = """\
# what this model is for
max_queue_delay_ms = 2   # agreed with the clients

[instances]
# one each
count = 1
threads = 1

[labels]
stable = 1
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx_models.save(onnx_models.mlp(16, 64, 4), tmp_path / "m" / "1")
    return tmp_path / "m"


@pytest.fixture
def instances_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch takes 10 ms, on whatever."""

    def run_trial(trial: Trial) -> dict[int, Sample]:
        return {rows: Sample(rows * 10e-3, rows * 12e-3) for rows in trial.sizes}

    monkeypatch.setattr(runs, "run_trial", run_trial)
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    code = cli.main(["bench", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_real_model_is_measured_and_left_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "m", "--models", model.parent, "--cores", 1, "--seconds", 0.03)
    assert code == 0
    assert out.startswith("m:1 on 1 core\n")
    assert "now     " in out
    assert err.count("1 instance of 1 thread: ") == 3
    assert [path.name for path in model.iterdir()] == ["1"]


@pytest.mark.usefixtures("instances_pay")
def test_write_puts_the_settings_into_model_toml_and_keeps_the_rest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "model.toml"
    path.write_text(TEXT)
    code, out, _ = run(capsys, model, "--write")
    assert code == 0
    assert "wrote   instances.count = 4" in out
    assert path.read_text() == TEXT.replace("count = 1", "count = 4")
    assert load_model_toml(path, "m").instances.count == 4
    assert cli.main(["check", str(model)]) == 0


@pytest.mark.usefixtures("instances_pay")
def test_write_makes_a_model_toml_where_there_is_none(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, model, "--write", "--slo-ms", 100)[0] == 0
    config = load_model_toml(model / "model.toml", "m")
    assert (config.instances.count, config.instances.threads, config.batching.max_batch_size) == (4, 1, 8)
    assert cli.main(["check", str(model)]) == 0


@pytest.mark.usefixtures("instances_pay")
def test_nothing_is_written_unless_asked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model)
    assert code == 0
    assert "set     instances.count = 4" in out
    assert not (model / "model.toml").exists()


@pytest.mark.usefixtures("instances_pay")
def test_a_second_run_finds_nothing_more_to_change(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, model, "--write")[0] == 0
    written = (model / "model.toml").read_text()
    code, out, _ = run(capsys, model, "--write")
    assert code == 0
    assert "The settings stay as they are." in out
    assert (model / "model.toml").read_text() == written


@pytest.mark.usefixtures("instances_pay")
def test_machines_get_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, model, "--json")
    table = json.loads(out)
    assert (table["model"], table["version"], table["written"]) == ("m", 1, False)
    assert table["settings"] == {"instances.count": 4, "instances.threads": 1}
    assert {len(row["rates"]) for row in table["measured"]} == {runs.ROUNDS}


@pytest.mark.usefixtures("instances_pay")
def test_an_slo_that_cannot_be_kept_fails_and_writes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, model, "--write", "--slo-ms", 1)
    assert code == 1
    assert "nothing is within 1 ms: the smallest batch takes 12 ms at the least" in out
    assert not (model / "model.toml").exists()


def test_interrupted_it_leaves_the_file_as_it_was(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(trial: Trial) -> dict[int, Sample]:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_trial", interrupt)
    (model / "model.toml").write_text(TEXT)
    code, _, err = run(capsys, model, "--write")
    assert code == 1
    assert "interrupted, nothing was written" in err
    assert (model / "model.toml").read_text() == TEXT
    assert sorted(path.name for path in model.iterdir()) == ["1", "model.toml"]


# -- wrong use ---------------------------------------------------------------------------------------------------------


def test_a_config_pbtxt_is_not_written_and_measured_for_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.pbtxt").write_text('backend: "onnxruntime"\nmax_batch_size: 8\n')
    code, out, err = run(capsys, model, "--write")
    assert (code, out) == (2, "")
    assert "has a config.pbtxt, which is Triton's and is not written" in err
    assert not (model / "model.toml").exists()


def test_a_model_that_is_not_there_is_wrong_use(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there are: m" in run(capsys, "n", "--models", model.parent)[2]
    assert "expected a model's, or --models REPOSITORY" in run(capsys, model / "nowhere")[2]
    assert run(capsys, model / "nowhere")[0] == 2


def test_more_cores_than_there_are_is_wrong_use(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, model, "--cores", (os.cpu_count() or 1) + 1)
    assert code == 2
    assert "--cores: expected 1 to " in err


def test_a_model_that_cannot_be_served_fails_with_its_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "1" / "model.onnx").write_bytes(b"not a model")
    code, _, err = run(capsys, model, "--cores", 1)
    assert code == 1
    assert "could not load 1/model.onnx" in err
