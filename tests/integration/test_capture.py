"""Capture on a running server: what was asked and answered stands in the files, and nothing of it that is redacted."""

from __future__ import annotations

import asyncio
import os
import shutil
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as client
import tritonclient.utils.shared_memory as shm
from digits_requests import IMAGES, ask
from headrace.capture.reading import list_contents, read_capture
from headrace.errors import ConfigError
from headrace.testing import serve_in_process

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"


def all_at_once(address: str, requests: int) -> None:
    """So that several share a batch."""
    with client.InferenceServerClient(address) as stub:
        sent = []
        for number in range(requests):
            tensor = client.InferInput("image", [1, 64], "FP32")
            tensor.set_data_from_numpy(IMAGES[number : number + 1])
            done: Future[Any] = Future()
            stub.async_infer("digits", [tensor], lambda result, error, done=done: done.set_result(error or result), request_id=str(number))
            sent.append(done)
        for done in sent:
            assert not isinstance(done.result(30), Exception)


def repository(directory: Path, settings: str = "", before: str = "") -> Path:
    shutil.copytree(EXAMPLES / "digits", directory / "digits")
    toml = directory / "digits" / "model.toml"
    toml.write_text(before + toml.read_text() + settings)
    return directory


async def scraped(server: Any, line: str) -> str:
    """The metrics, once they have that line: requests are looked at after their answers have left."""
    text = ""
    async with asyncio.timeout(30):
        while line not in text:
            await asyncio.sleep(0.02)
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{server.http_address}/metrics").read().decode())
    return text


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_requests_are_captured_with_their_answers(tmp_path: Path, transport: str) -> None:
    captures = tmp_path / "captures"
    options = {"transport": transport, "capture": str(captures), "capture_max_per_second": 1000.0}
    async with serve_in_process(repository(tmp_path / "models"), **options) as server:
        answers = await asyncio.to_thread(ask, server.grpc_addresses[0], [1, 5, 33])
    found = list(read_capture(captures))
    assert [(each.model, each.version, each.id, each.rows) for each in found] == [
        ("digits", 1, f"r{i}", n) for i, n in enumerate([1, 5, 33])
    ]
    start = 0
    for each, answer in zip(found, answers, strict=True):
        np.testing.assert_array_equal(each.inputs[0].array(), IMAGES[start : start + each.rows])
        start += each.rows
        assert {tensor.name for tensor in each.outputs} == {"label", "probabilities"}
        for tensor in each.outputs:
            np.testing.assert_array_equal(tensor.array(), answer.as_numpy(tensor.name))
    assert [each.at for each in found] == sorted(each.at for each in found)


async def test_each_request_of_a_batch_has_its_own_rows(tmp_path: Path) -> None:
    captures = tmp_path / "captures"
    models = repository(tmp_path / "models", before="max_queue_delay_ms = 50\n")
    async with serve_in_process(models, capture=str(captures), capture_max_per_second=1000.0) as server:
        await asyncio.to_thread(all_at_once, server.grpc_addresses[0], 40)
        assert server.models.resolve("digits", "").counters.snapshot().batches < 40
    found = list(read_capture(captures))
    assert sorted(int(each.id) for each in found) == list(range(40))
    for each in found:
        outputs = {tensor.name: tensor.array() for tensor in each.outputs}
        np.testing.assert_array_equal(each.inputs[0].array(), IMAGES[int(each.id)][None])
        assert outputs["probabilities"].argmax(axis=1).tolist() == outputs["label"].ravel().tolist()


async def test_what_is_redacted_is_nowhere_in_the_files(tmp_path: Path) -> None:
    captures = tmp_path / "captures"
    models = repository(tmp_path / "models", '[capture]\nredact = ["image", "label"]\n')
    async with serve_in_process(models, capture=str(captures)) as server:
        await asyncio.to_thread(ask, server.grpc_addresses[0], [2])
    (found,) = read_capture(captures)
    shapes = {tensor.name: (tensor.shape, tensor.data is None) for tensor in (*found.inputs, *found.outputs)}
    assert shapes["image"] == ((2, 64), True)
    assert shapes["probabilities"] == ((2, 10), False)
    assert shapes["label"][1]
    (file,) = captures.glob("*.msgpack")
    assert IMAGES[0].tobytes() not in file.read_bytes()


async def test_a_mistyped_name_fails_the_version_instead_of_writing_what_nobody_may_see(tmp_path: Path) -> None:
    models = repository(tmp_path / "models", '[capture]\nredact = ["imgae"]\n')
    async with serve_in_process(models, capture=str(tmp_path / "captures")) as server:
        (row,) = server.models.index()
        assert "[capture] redact: 'imgae' is not in the model, did you mean 'image'?" in row.reason


async def test_rate_and_opt_out_are_kept_and_shown_in_metrics(tmp_path: Path) -> None:
    models = repository(tmp_path / "models")
    shutil.copytree(models / "digits", models / "quiet")
    (models / "quiet" / "model.toml").write_text("[capture]\nenabled = false\n")
    captures = tmp_path / "captures"
    async with serve_in_process(models, capture=str(captures), capture_max_per_second=0.001) as server:
        await asyncio.to_thread(ask, server.grpc_addresses[0], [1] * 20)
        text = await scraped(server, 'headrace_capture_requests_total{model="digits",version="1"} 1.0')
        assert 'headrace_capture_skipped_total{cause="rate",model="digits",version="1"} 19.0' in text
        assert "quiet" not in "".join(line for line in text.splitlines() if "capture" in line)
        assert "headrace_capture_errors_total 0.0" in text
    assert list_contents(captures).requests == {("digits", 1): 1}


async def test_a_directory_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="capture:"):
        async with serve_in_process(repository(tmp_path / "models"), capture=str(tmp_path / "file")):
            pass


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_large_tensors_are_written_and_those_in_their_clients_memory_are_not(tmp_path: Path, transport: str) -> None:
    """Of large messages tensors are views; what lies in shared memory is its client's again once it has its answer."""
    onnx_models.save(onnx_models.identity(), tmp_path / "models" / "numbers" / "1")
    (tmp_path / "models" / "numbers" / "model.toml").write_text("max_batch_size = 100000\n")
    rows = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    options = {"transport": transport, "capture": str(tmp_path / "captures"), "client_shared_memory": True}

    def ask_both(address: str) -> None:
        region = shm.create_shared_memory_region("r", f"headrace_capture_{transport}_{os.getpid()}", rows.nbytes, create_only=True)
        try:
            with client.InferenceServerClient(address) as stub:
                shm.set_shared_memory_region(region, [rows])
                stub.register_system_shared_memory("r", region._shm_key, rows.nbytes)
                for is_shared in (False, True):
                    tensor = client.InferInput("x", list(rows.shape), "FP32")
                    if is_shared:
                        tensor.set_shared_memory("r", rows.nbytes)
                    else:
                        tensor.set_data_from_numpy(rows)
                    np.testing.assert_array_equal(stub.infer("numbers", [tensor]).as_numpy("y"), rows)
                stub.unregister_system_shared_memory("r")
        finally:
            shm.destroy_shared_memory_region(region)

    async with serve_in_process(tmp_path / "models", **options) as server:
        await asyncio.to_thread(ask_both, server.grpc_addresses[0])
        await scraped(server, 'headrace_capture_skipped_total{cause="shared_memory",model="numbers",version="1"} 1.0')
    (found,) = read_capture(tmp_path / "captures")
    np.testing.assert_array_equal(found.inputs[0].array(), rows)
    np.testing.assert_array_equal(found.outputs[0].array(), rows)
