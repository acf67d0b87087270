"""`headrace drift` as a user has it: a reference made of data, served, and a report of what became of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as client
from digits_requests import ask
from headrace import cli
from headrace.app import Server
from headrace.config import ServerConfig
from headrace.drift.reference_file import decode
from headrace.testing import serve_in_process
from sklearn.datasets import load_digits

Capture = pytest.CaptureFixture[str]
EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
DIGITS = load_digits()
IMAGES = DIGITS.data.astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "digits.npz"
    np.savez(path, image=IMAGES, digit=DIGITS.target)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES / "digits", tmp_path / "models" / "digits", ignore=shutil.ignore_patterns("drift.msgpack"))
    return tmp_path / "models" / "digits"


def drift(*arguments: str | Path) -> int:
    return cli.main(("drift", *map(str, arguments)))


def test_a_profile_is_put_where_the_server_takes_it_from(model: Path, data: Path, capsys: Capture) -> None:
    assert drift("profile", "--model", model, "--data", data, "--label", "digit") == 0
    out = capsys.readouterr().out
    assert "1,797 rows, 37 features, from profile" in out
    assert "98.61% by its labels" in out
    reference = decode((model / "1" / "drift.msgpack").read_bytes())
    assert reference.calibration is not None
    assert {each.counted for each in reference.features} == {1797}
    assert drift("show", model / "1" / "drift.msgpack") == 0
    assert out.startswith(capsys.readouterr().out.strip().splitlines()[0])


def test_the_shipped_reference_is_of_the_shipped_model(model: Path, data: Path) -> None:
    assert drift("profile", "--model", model, "--data", data, "--label", "digit", "--out", data.with_suffix(".msgpack")) == 0
    made = decode(data.with_suffix(".msgpack").read_bytes())
    shipped = decode((EXAMPLES / "digits" / "1" / "drift.msgpack").read_bytes())
    assert [each.feature for each in made.features] == [each.feature for each in shipped.features]
    for a, b in zip(made.features, shipped.features, strict=True):
        assert a.edges == pytest.approx(b.edges, rel=1e-4, abs=1e-6)  # another processor may round otherwise


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_give_the_same_reference_as_arrays(model: Path, data: Path, suffix: str) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(IMAGES, columns=[f"image.{index}" for index in range(64)]).assign(digit=DIGITS.target)
    path = data.with_suffix(suffix)
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    for source in (data, path):
        assert drift("profile", "--model", model, "--data", source, "--label", "digit", "--out", source.with_suffix(".msgpack")) == 0
    arrays, rows = (decode(source.with_suffix(".msgpack").read_bytes()) for source in (data, path.with_suffix(".msgpack")))
    assert (rows.features, rows.calibration, rows.accuracy) == (arrays.features, arrays.calibration, arrays.accuracy)


async def test_what_a_server_has_captured_becomes_the_reference(model: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    captures = tmp_path / "captures"
    async with serve_in_process(model.parent, capture=str(captures), capture_max_per_second=1000.0) as server:
        await asyncio.to_thread(ask, server.grpc_addresses[0], [8] * 200 + [1] * 197)  # all digits once
    for source in (captures, data):
        out = source.with_suffix(".msgpack")
        assert await asyncio.to_thread(drift, "profile", "--model", model, "--data", source, "--out", out) == 0
    captured, whole = (decode(source.with_suffix(".msgpack").read_bytes()) for source in (captures, data))
    assert captured.features == whole.features
    shutil.move(model, model.with_name("letters"))
    assert (
        await asyncio.to_thread(drift, "profile", "--model", model.with_name("letters"), "--data", captures, "--out", tmp_path / "r") == 2
    )
    assert "expected requests for model 'letters', got those for digits" in capsys.readouterr().err


def test_a_published_version_is_left_as_it_is(tmp_path: Path, model: Path, data: Path, capsys: Capture) -> None:
    published = tmp_path / "published"
    assert cli.main(("publish", str(model / "1" / "model.onnx"), "--to", str(published), "--name", "digits")) == 0
    assert drift("profile", "--model", published / "digits", "--data", data) == 2
    assert "was published and must stay as it is" in capsys.readouterr().err
    assert drift("profile", "--model", published / "digits", "--data", data, "--out", tmp_path / "r.msgpack") == 0
    assert cli.main((
        "publish", str(model / "1" / "model.onnx"), "--to", str(published), "--name", "digits", "--reference", str(tmp_path / "r.msgpack")
    )) == 0  # fmt: skip
    assert (published / "digits" / "2" / "drift.msgpack").read_bytes() == (tmp_path / "r.msgpack").read_bytes()


def test_data_that_does_not_fit_writes_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((3, 63), np.float32))
    assert drift("profile", "--model", model, "--data", tmp_path / "a.npz") == 2
    assert "input 'image': expected rows of [64], got [63]" in capsys.readouterr().err
    assert not (model / "1" / "drift.msgpack").exists()


def send(address: str, images: np.ndarray, requests: int) -> None:
    random = np.random.default_rng(0)
    with client.InferenceServerClient(address) as stub:
        for _ in range(requests):
            rows = images[random.integers(0, len(images), 50)]
            tensor = client.InferInput("image", [50, 64], "FP32")
            tensor.set_data_from_numpy(rows)
            stub.infer("digits", [tensor])


async def test_a_report_of_a_running_server_names_what_drifts_and_fails_a_pipeline(
    tmp_path: Path, model: Path, data: Path, capsys: Capture
) -> None:
    assert await asyncio.to_thread(drift, "profile", "--model", model, "--data", data, "--label", "digit") == 0
    settings = model / "model.toml"
    settings.write_text(settings.read_text() + "[drift]\nbudget = 0\n")
    server = Server(ServerConfig(models=(str(model.parent),), grpc=("127.0.0.1:0",), http=""))
    await server.start()
    address = server.grpc_addresses[0]

    async def report(*more: str | Path) -> tuple[int, str]:
        code = await asyncio.to_thread(drift, "report", "digits", "--url", address, *more)
        return code, capsys.readouterr().out

    try:
        capsys.readouterr()
        assert "none has ended yet" in (await report())[1]
        await asyncio.to_thread(send, address, IMAGES, 40)
        code, out = await report("--fail-on-drift")
        assert code == 0
        assert "2,000 rows" in out
        await asyncio.to_thread(send, address, np.ascontiguousarray(IMAGES[:, ::-1]), 40)
        code, out = await report("--html", tmp_path / "report.html", "--fail-on-drift")
        assert code == 1
        assert "accuracy: estimated accuracy" in out
        assert "probabilities.confidence drifted" in out
        assert "probabilities.confidence drifted" in (tmp_path / "report.html").read_text(encoding="utf-8")
        code, out = await report("--feature", "probabilities.class")
        assert code == 0
        assert len([line for line in out.splitlines() if line[:1].isdigit()]) == 10
        code, out = await report("--json")
        table = json.loads(out)
        assert table["seen_rows"] == 4000
        assert table["features"][0]["is_raised"] is True
        assert await asyncio.to_thread(drift, "report", "digits", "--url", address, "--feature", "nothing") == 2
    finally:
        await server.stop()
