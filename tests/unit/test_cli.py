from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import onnx_models
import pytest
from headrace import __version__, cli
from headrace.config import ServerConfig
from headrace.config_loading import option_keys
from headrace.errors import ConfigError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    onnx_models.save(onnx_models.slow(), tmp_path / "slow" / "1")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)"""
    code = cli.main(arguments)
    return code, *capsys.readouterr()


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_shows_every_setting_with_its_origin(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "slow" / "model.toml").write_text("max_queue_delay_ms = 2\n[instances]\nthreads = 1\n")
    code, out, err = run(capsys, "check", str(repository))
    lines = [line.split() for line in out.splitlines()]
    assert (code, err, lines[0]) == (0, "", ["slow:1"])
    assert ["max_queue_delay_ms", "2.0", "(model.toml)"] in lines
    assert ["threads", "1", "(model.toml)"] in lines
    assert ["max_queue_size", "4096", "(default)"] in lines
    assert any(line[:2] == ["input", "x"] and line[-1] == "(model.onnx)" for line in lines)


def test_one_model_that_cannot_be_served_fails_the_check_and_hides_no_other(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = repository / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"not a model")
    (repository / "empty").mkdir()
    code, out, _ = run(capsys, "check", str(repository))
    assert code == 1
    assert re.search(r"^broken:1\n  cannot be served: .*model\.onnx", out, re.MULTILINE)
    assert re.search(r"^empty\n  cannot be served: .*no version", out, re.MULTILINE)
    assert re.search(r"^slow:1\n  backend +onnxruntime", out, re.MULTILINE)


def test_check_speaks_json_to_machines(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "empty").mkdir()
    code, out, _ = run(capsys, "check", "--json", str(repository))
    failed, good = json.loads(out)
    assert code == 1
    assert failed["model"] == "empty"
    assert "no version" in failed["error"]
    assert (good["model"], good["version"]) == ("slow", 1)
    assert ["max_queue_size", "4096", "default"] in good["settings"]


def test_a_version_policy_that_selects_nothing_is_not_passed_over(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "slow" / "model.toml").write_text('version_policy = "7"')
    code, out, _ = run(capsys, "check", str(repository))
    assert code == 1
    assert "version_policy '7' selects none of its versions: 1" in out


def test_a_repository_without_models_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", str(tmp_path))
    assert code == 1
    assert f"no models in '{tmp_path}'" in err


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "no models: expected --models DIR, HEADRACE_MODELS or `models` in headrace.toml"),
        (["serve", "--models", "m", "--grpc", "8001"], "grpc: expected HOST:PORT or unix:PATH, got '8001'"),
        (["serve", "--models", "m", "--load-threads", "0"], "--load-threads: expected at least 1, got 0"),
        (["serve", "--config", "missing.toml"], "missing.toml: No such file"),
        (["check", "missing"], "model repository 'missing': expected a directory"),
    ],
)
def test_wrong_use_exits_2_with_one_line_and_no_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"headrace: {message}")


@pytest.mark.parametrize("arguments", [[], ["sevre"], ["serve", "--transprot", "auto"], ["serve", "--log-format", "xml"]])
def test_what_argparse_refuses_exits_2_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: headrace" in capsys.readouterr().err


# -- the runtime -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "message"),
    [(set(), r"pip install 'headrace\[cpu\]'"), ({"onnxruntime", "onnxruntime-gpu"}, "both installed")],
)
def test_none_or_both_of_the_runtimes_is_an_error_that_says_what_to_install(
    installed: set[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_is_installed", installed.__contains__)
    with pytest.raises(ConfigError, match=message):
        cli.check_runtime()


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime-gpu"])
def test_one_runtime_is_enough(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_is_installed", {installed}.__contains__)
    cli.check_runtime()


# -- help --------------------------------------------------------------------------------------------------------------


def test_serve_explains_every_option_with_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for key, field in option_keys(ServerConfig).items():
        if field.metadata["secret"]:
            assert key.replace("_", "-") not in text
            continue
        assert f"--{key.replace('_', '-')}" in text
        assert f"HEADRACE_{key.upper()}" in re.sub(r"\s+", "", text)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"headrace {__version__}\n"


def test_asking_for_help_imports_neither_grpc_nor_a_runtime() -> None:
    code = (
        "import sys; from headrace.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(re.findall(r"'(\w+)'", done.stderr))
    assert "headrace" in imported
    assert not imported & {"grpc", "onnxruntime", "numpy", "aiohttp", "google"}
