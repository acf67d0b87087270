"""Declared preprocessing and postprocessing on a running server: bytes of any size in, the most probable classes out."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from headrace import cli
from headrace.capture.reading import read_capture
from headrace.testing import serve_in_process
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "digits_image"
DIGITS, LABELS = load_digits().images[-60:], load_digits().target[-60:]
Images = NDArray[np.uint8]


def repository(directory: Path, *, settings: str = "") -> Path:
    """digits_image as it is, with `settings` besides; plain: the same model without any."""
    shutil.copytree(EXAMPLE, directory / "digits_image")
    toml = directory / "digits_image" / "model.toml"
    toml.write_text(toml.read_text() + settings)
    shutil.copytree(EXAMPLE / "1", directory / "plain" / "1")
    return directory


def drawn(height: int, width: int, count: int = 60) -> Images:
    """[count, height, width, 1]"""
    pictures = [Image.fromarray((digit * 15.9).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC) for digit in DIGITS]
    return np.stack([np.asarray(picture) for picture in pictures[:count]])[..., None]


def infer(stub: Any, model: str, array: NDArray[Any], datatype: str, outputs: Sequence[str] = (), **options: Any) -> Any:
    tensor = triton.InferInput("image", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return stub.infer(model, [tensor], outputs=[triton.InferRequestedOutput(name) for name in outputs] or None, **options)


def by_hand(stub: Any, images: Images) -> tuple[NDArray[Any], NDArray[Any]]:
    """(values, classes) of the three most probable, of the plain model: resized by Pillow, softmax by scipy, sorted whole."""
    small = [np.asarray(Image.fromarray(each[..., 0].astype(np.float32)).resize((8, 8), Image.Resampling.BILINEAR)) for each in images]
    scores = infer(stub, "plain", (np.stack(small)[:, None] / 255).astype(np.float32), "FP32").as_numpy("scores")
    classes = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    return np.take_along_axis(softmax(scores.astype(np.float64), axis=1), classes, axis=1), classes


def check(stub: Any, images: Images) -> None:
    found = infer(stub, "digits_image", images, "UINT8")
    values, classes = by_hand(stub, images)
    np.testing.assert_array_equal(found.as_numpy("scores_classes"), classes)
    np.testing.assert_allclose(found.as_numpy("scores"), values, rtol=1e-3, atol=1e-6)


async def talk(models: Path, work: Callable[[Any], None], **options: Any) -> None:
    async with serve_in_process(models, **options) as server:

        def with_client() -> None:
            with triton.InferenceServerClient(server.grpc_addresses[0]) as stub:
                work(stub)

        await asyncio.to_thread(with_client)


async def test_images_of_any_size_are_answered_as_by_hand_on_the_plain_model(tmp_path: Path, transport: str) -> None:
    def work(stub: Any) -> None:
        for size in ((8, 8), (31, 20), (200, 300), (5, 6), (1, 1)):
            check(stub, drawn(*size))
        best = infer(stub, "digits_image", drawn(64, 64), "UINT8").as_numpy("scores_classes")[:, 0]
        assert np.mean(best == LABELS) > 0.8

    await talk(repository(tmp_path), work, transport=transport)


async def test_requests_of_different_sizes_at_once_have_each_its_own_answer(tmp_path: Path, transport: str) -> None:
    models = repository(tmp_path)
    toml = models / "digits_image" / "model.toml"
    toml.write_text("max_queue_delay_ms = 20\n" + toml.read_text())

    def work(stub: Any) -> None:
        sizes = [(8 + i % 3, 9 + i % 2) for i in range(24)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda size: check(stub, drawn(*size, count=2)), sizes))

    await talk(models, work, transport=transport)


async def test_clients_are_told_what_they_see(tmp_path: Path, transport: str) -> None:
    def work(stub: Any) -> None:
        metadata = stub.get_model_metadata("digits_image", as_json=True)
        assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["inputs"] + metadata["outputs"]] == [
            ("image", "UINT8", ["-1", "-1", "-1", "1"]),
            ("scores", "FP32", ["-1", "3"]),
            ("scores_classes", "INT32", ["-1", "3"]),
        ]
        config = stub.get_model_config("digits_image", as_json=True)["config"]
        assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["-1", "-1", "1"]}]
        assert config["output"] == [
            {"name": "scores", "data_type": "TYPE_FP32", "dims": ["3"]},
            {"name": "scores_classes", "data_type": "TYPE_INT32", "dims": ["3"], "label_filename": "labels.txt"},
        ]
        only = infer(stub, "digits_image", drawn(9, 9), "UINT8", ["scores_classes"])
        assert [output.name for output in only.get_response().outputs] == ["scores_classes"]

    await talk(repository(tmp_path), work, transport=transport)


@pytest.mark.parametrize(
    ("array", "datatype", "text"),
    [
        (np.zeros((1, 1, 8, 8), np.float32), "FP32", "input 'image' data-type is 'FP32', but model 'digits_image' expects 'UINT8'"),
        (np.zeros((1, 8, 8, 3), np.uint8), "UINT8", r"Expected \[-1,-1,-1,1\], got \[1,8,8,3\]"),
        (np.zeros((2, 100, 11, 1), np.uint8), "UINT8", "input 'image' .* expected images of 1 to 1000 pixels, got 100 x 11"),
        (np.zeros((1, 0, 8, 1), np.uint8), "UINT8", "expected images of 1 to 1000 pixels, got 0 x 8"),
    ],
)  # fmt: skip
async def test_what_is_no_such_image_is_the_clients_fault_alone(
    tmp_path: Path, transport: str, array: NDArray[Any], datatype: str, text: str
) -> None:
    models = repository(tmp_path)
    toml = models / "digits_image" / "model.toml"
    toml.write_text(toml.read_text().replace("size = [8, 8]", "size = [8, 8]\nmax_pixels = 1000"))

    def work(stub: Any) -> None:
        with pytest.raises(triton.InferenceServerException, match=text) as error:
            infer(stub, "digits_image", array, datatype)
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        check(stub, drawn(10, 100, count=3))

    await talk(models, work, transport=transport)


async def test_a_step_that_does_not_fit_the_model_is_a_reason_and_serves_nothing(tmp_path: Path) -> None:
    models = repository(tmp_path)
    toml = models / "digits_image" / "model.toml"
    toml.write_text(toml.read_text().replace("top_k = 3", "top_k = 11"))
    async with serve_in_process(models) as server:
        (row,) = [row for row in server.models.index() if row.model == "digits_image"]
        assert row.reason.startswith("[[postprocess]] of output 'scores' of 'digits_image': top_k: expected at most 10 classes, got 11")


async def test_a_model_that_begins_to_take_images_is_swapped_while_it_serves(tmp_path: Path, transport: str) -> None:
    models = repository(tmp_path)
    shutil.move(models / "digits_image" / "model.toml", tmp_path / "later.toml")
    async with serve_in_process(models, transport=transport, settle=0, poll_interval=0.1) as server:
        asked = asyncio.Event()

        def ask_until_images_are_taken() -> tuple[int, str]:
            """(answers to floats before, why there are none any more)"""
            floats, count = np.zeros((1, 1, 8, 8), np.float32), 0
            with triton.InferenceServerClient(server.grpc_addresses[0]) as stub:
                while True:
                    try:
                        infer(stub, "digits_image", floats, "FP32")
                    except triton.InferenceServerException as error:
                        check(stub, drawn(33, 44))
                        return count, str(error)
                    count += 1
                    server_loop.call_soon_threadsafe(asked.set)

        server_loop = asyncio.get_running_loop()
        asking = asyncio.create_task(asyncio.to_thread(ask_until_images_are_taken))
        await asked.wait()
        shutil.move(tmp_path / "later.toml", models / "digits_image" / "model.toml")
        async with asyncio.timeout(60):
            count, why = await asking
        assert count > 0
        assert "input 'image' data-type is 'FP32', but model 'digits_image' expects 'UINT8'" in why


async def test_drift_and_captures_are_of_what_clients_send_and_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a capture can be asked again of the model without a server."""
    models, captures, images = repository(tmp_path / "models"), tmp_path / "captures", drawn(20, 30, count=8)
    shutil.rmtree(models / "plain")
    options = {"capture": str(captures), "capture_max_per_second": 1e4}
    await talk(models, lambda stub: infer(stub, "digits_image", images, "UINT8", request_id="r"), **options)
    (found,) = read_capture(captures)
    np.testing.assert_array_equal(found.inputs[0].array(), images)
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in found.outputs] == [
        ("scores", "FP32", (8, 3)),
        ("scores_classes", "INT32", (8, 3)),
    ]
    arguments = ["replay", str(captures), "--model", str(models / "digits_image"), "--max-flips", "0", "--json"]
    assert await asyncio.to_thread(cli.main, arguments) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 0


async def test_a_reference_is_made_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = repository(tmp_path)
    np.savez(tmp_path / "data.npz", image=np.concatenate([drawn(20, 30)] * 4))
    arguments = ["drift", "profile", "--model", str(models / "digits_image"), "--data", str(tmp_path / "data.npz")]
    assert await asyncio.to_thread(cli.main, arguments) == 0, capsys.readouterr().err
    assert (models / "digits_image" / "1" / "drift.msgpack").is_file()
    async with serve_in_process(models) as server:
        subject = server.models.resolve("digits_image", "")
        assert subject.drift is not None
        titles = {each.feature.title for each in subject.drift.reference.features}
        assert {"image.mean[0]", "scores.0", "scores_classes.0"} <= titles


def test_check_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(repository(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "resized to 8 x 8, antialiased; x * 0.00392157; FP32 [-1,1,8,8] NCHW to the model" in out
    assert "softmax, the 3 largest and their classes" in out
