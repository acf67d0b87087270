"""`headrace replay` of what a real server has captured: against itself, against a worse version, and over gRPC."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from digits_requests import ask
from headrace import cli
from headrace.testing import serve_in_process
from onnx import numpy_helper

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
Capture = pytest.CaptureFixture[str]


def worse_version(directory: Path) -> Path:
    """digits with noise on its weights."""
    shutil.copytree(EXAMPLES / "digits", directory / "digits")
    path = directory / "digits" / "1" / "model.onnx"
    model, random = onnx.load(path), np.random.default_rng(0)
    for weights in model.graph.initializer:
        array = numpy_helper.to_array(weights)
        if array.dtype == np.float32 and array.ndim == 2:
            noisy = (array + random.normal(scale=0.15, size=array.shape)).astype(np.float32)
            weights.CopyFrom(numpy_helper.from_array(noisy, weights.name))
    onnx.save(model, path)
    return directory


async def capture_some(directory: Path, settings: str = "") -> Path:
    shutil.copytree(EXAMPLES / "digits", directory / "models" / "digits")
    toml = directory / "models" / "digits" / "model.toml"
    toml.write_text(toml.read_text() + settings)
    async with serve_in_process(directory / "models", capture=str(directory / "captures"), capture_max_per_second=1e4) as server:
        await asyncio.to_thread(ask, server.grpc_addresses[0], [1, 7, 20, 1, 1, 60] * 3)
    return directory / "captures"


def headrace(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in ("replay", *arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("place", ["digits", "digits/1", "digits/1/model.onnx"])
async def test_the_version_that_was_captured_answers_the_same(tmp_path: Path, capsys: Capture, place: str) -> None:
    captures = await capture_some(tmp_path)
    arguments = (captures, "--model", EXAMPLES / place, "--rtol", "1e-5", "--max-flips", "0")
    code, out, err = await asyncio.to_thread(headrace, capsys, *arguments)
    assert (code, err) == (0, "")
    assert "18 requests (270 rows) captured of digits" in out
    assert "passed: within the limits" in out


async def test_a_worse_version_fails_the_gate_and_says_by_how_much(tmp_path: Path, capsys: Capture) -> None:
    captures, worse = await capture_some(tmp_path), worse_version(tmp_path / "worse")
    arguments = (captures, "--model", worse / "digits", "--max-flips", "0.001", "--json")
    code, out, _ = await asyncio.to_thread(headrace, capsys, *arguments)
    assert code == 1
    report = json.loads(out)
    outputs: dict[str, Any] = {each["name"]: each for each in report["outputs"]}
    assert outputs["probabilities"]["flips"] == outputs["label"]["flips"] > 0
    assert outputs["probabilities"]["max_absolute"] > 0.1
    assert len(report["failed_for"]) == 2
    code, out, _ = await asyncio.to_thread(headrace, capsys, captures, "--model", worse / "digits")
    assert code == 0, "without limits it only tells"


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_served_version_is_asked_over_the_protocol(tmp_path: Path, capsys: Capture, transport: str) -> None:
    captures = await capture_some(tmp_path)
    async with serve_in_process(EXAMPLES, transport=transport) as server:
        arguments = (captures, "--url", server.grpc_addresses[0], "--model", "digits", "--rtol", "1e-5", "--json")
        code, out, err = await asyncio.to_thread(headrace, capsys, *arguments)
        assert (code, err) == (0, "")
        assert json.loads(out)["requests"] == 18
        other = (captures, "--url", server.grpc_addresses[0], "--model", "diabetes")
        code, out, _ = await asyncio.to_thread(headrace, capsys, *other)
        assert code == 1
        assert "18 requests failed" in out
        assert "diabetes" in out
        code, _, err = await asyncio.to_thread(headrace, capsys, *other[:-1], "nobody")
        assert (code, err.count("\n")) == (1, 1)


async def test_captured_requests_warm_the_next_version_up(tmp_path: Path, capsys: Capture) -> None:
    captures = await capture_some(tmp_path)
    target = tmp_path / "models" / "digits" / "warmup"
    code, out, err = await asyncio.to_thread(headrace, capsys, captures, "--warm-up", target, "--limit", 6)
    assert (code, err) == (0, "")
    assert "6 requests for digits written" in out
    async with serve_in_process(tmp_path / "models") as server:
        version = server.models.resolve("digits", "")
        assert server.models.is_ready, version.reason
    (target / "0007.pb").write_bytes(b"\xff")
    async with serve_in_process(tmp_path / "models") as server:
        (row,) = server.models.index()
        assert "warmup/0007.pb" in row.reason


async def test_redacted_inputs_are_left_out_and_nothing_compared_is_a_failure(tmp_path: Path, capsys: Capture) -> None:
    captures = await capture_some(tmp_path, '[capture]\nredact = ["image"]\n')
    code, out, _ = await asyncio.to_thread(headrace, capsys, captures, "--model", EXAMPLES / "digits")
    assert code == 1
    assert "18 left out, their inputs are redacted" in out
    assert "failed: nothing was compared" in out


async def test_a_capture_that_a_crash_cut_off_is_replayed_up_to_the_cut(tmp_path: Path, capsys: Capture) -> None:
    captures = await capture_some(tmp_path)
    (file,) = captures.glob("*.msgpack")
    file.write_bytes(file.read_bytes()[:-100])
    code, out, err = await asyncio.to_thread(headrace, capsys, captures, "--model", EXAMPLES / "digits", "--max-flips", 0)
    assert code == 0
    assert "17 requests" in out
    assert "cut off at byte" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((".",), 2, "expected --model with what is to be asked, or --warm-up"),
        ((".", "--model", "a", "--warm-up", "b"), 2, "expected --model with what is to be asked"),
        (("nowhere", "--model", "a"), 1, "nowhere: expected a capture's directory or one of its files, found nothing"),
        ((__file__, "--model", "a"), 1, "test_replay.py: expected a capture"),
        ((".", "--model", "a", "--url", "8001"), 2, "--url: expected HOST:PORT"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], code: int, message: str, capsys: Capture) -> None:
    got, out, err = headrace(capsys, *arguments)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert message in err
