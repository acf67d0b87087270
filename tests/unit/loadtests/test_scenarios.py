import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtests import open_loop, scenarios
from loadtests.contestants import Contestant, headrace, triton_peer
from loadtests.models import MLP, write_repository
from loadtests.open_loop import alternate, arrivals
from loadtests.scenarios import Bracket, Entrant, entrants_of, fixed_setting


def test_a_bisection_comes_as_near_to_the_highest_rate_as_it_promises() -> None:
    bracket, tried = Bracket(0.0, 12_000.0), 0
    while not bracket.is_narrow:
        bracket, tried = bracket.narrowed(bracket.middle <= 7321.0), tried + 1
    assert bracket.low <= 7321.0 < bracket.high
    assert bracket.low > 0.95 * 7321.0
    assert tried <= 6


@pytest.mark.parametrize(("text", "setting"), [("16:2", (16, 2.0)), ("8", (8, 0.0)), ("1:0.5", (1, 0.5))])
def test_fixed_settings_are_rows_and_milliseconds(text: str, setting: tuple[int, float]) -> None:
    assert fixed_setting(text) == setting


@pytest.mark.parametrize("text", ["", "x", "0:1", "4:-1", "4:x"])
def test_a_fixed_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected ROWS"):
        fixed_setting(text)


def test_fixed_settings_take_part_beside_the_first_server_and_the_last_stays_last() -> None:
    entrants = entrants_of([headrace("native"), triton_peer("x.sh")], [(16, 2.0), (1, 0.0)])
    assert [entrant.name for entrant in entrants] == ["headrace-native", "headrace-native-16x2ms", "headrace-native-1x0ms", "triton"]
    assert entrants[1].settings == "max_batch_size = 16\nmax_queue_delay_ms = 2\n"
    assert [entrant.takes_repositories for entrant in entrants] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rates", "--fixed", "zero"], "expected ROWS"),
        (["rates", "--client-core", "4096"], "cores [4096]: expected some of"),
        (["rates", "--rounds", "0"], "expected at least one round"),
        (["mixed", "--without-headrace", "--contestant", "other=serve {onnx} {port}"], "expected a server that takes a repository"),
        (["rates", "--model", "nothing"], "expected NAME=FILE.onnx"),
        (["unheard-of"], "invalid choice"),
    ],
)
def test_wrong_use_ends_with_two_and_says_what_was_expected(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scenarios", *arguments])
    monkeypatch.delenv("HEADRACE_TRITON_PEER", raising=False)
    monkeypatch.setattr(scenarios.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(scenarios, "exit_on_terminate", lambda: None)
    with pytest.raises(SystemExit) as left:
        scenarios.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_calls_are_made_in_turn() -> None:
    assert alternate(5, 2).tolist() == [0, 1, 0, 1, 0]


def test_arrivals_have_names_or_are_a_file(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("0\n0.5\n")
    assert arrivals(str(tmp_path / "trace"), 1.0, 1.0, 1).tolist() == [0.0, 0.5]
    assert np.allclose(arrivals("constant", 2.0, 1.0, 1), [0.0, 0.5])
    with pytest.raises(ValueError, match="expected poisson, constant, bursts, ramp, or a file"):
        arrivals("sometimes", 1.0, 1.0, 1)


def test_nobody_to_talk_to_ends_with_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["open_loop", "127.0.0.1:1", "--seconds", "0.1"])
    assert open_loop.main() == 1
    assert "127.0.0.1:1: expected a gRPC server" in capsys.readouterr().err


def test_each_contestant_has_a_repository_of_its_own_with_its_settings(tmp_path: Path) -> None:
    path = write_repository(tmp_path / "models", {MLP: None})[MLP]
    entrant = Entrant(Contestant("fixed", ""), "max_batch_size = 4\n")
    repository = scenarios.lay_out(tmp_path, entrant, {MLP: path}, levels=2)
    assert (repository / MLP / "1" / "model.onnx").is_file()
    assert (repository / MLP / "model.toml").read_text() == "max_batch_size = 4\npriority_levels = 2\n"
