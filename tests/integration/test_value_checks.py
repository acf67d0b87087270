"""Values that model.toml does not allow, on a running server: refused or counted, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from headrace.testing import serve_in_process

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "digits"


def digits(directory: Path, settings: str) -> Path:
    shutil.copytree(EXAMPLE, directory / "digits")
    toml = directory / "digits" / "model.toml"
    toml.write_text(toml.read_text() + '\n[[input]]\nname = "image"\n' + settings)
    return directory


def infer(stub: triton.InferenceServerClient, image: np.ndarray) -> np.ndarray:
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    return stub.infer("digits", [tensor], request_id="r").as_numpy("label")


def metrics(address: str) -> str:
    return urllib.request.urlopen(f"http://{address}/metrics").read().decode()


GOOD, BAD = np.full((2, 64), 8, np.float32), np.full((2, 64), 17, np.float32)


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_a_request_with_refused_values_fails_alone(tmp_path: Path, transport: str) -> None:
    models = digits(tmp_path, 'minimum = 0\nmaximum = 16\nfinite = true\non_invalid = "refuse"\n')
    async with serve_in_process(models, transport=transport, http="127.0.0.1:0") as server:

        def talk() -> None:
            with triton.InferenceServerClient(server.grpc_addresses[0]) as stub:
                expected = infer(stub, GOOD)
                with pytest.raises(triton.InferenceServerException, match="row 0, element 0: expected 0 to 16, got 17") as error:
                    infer(stub, BAD)
                assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
                np.testing.assert_array_equal(infer(stub, GOOD), expected)
            labels = 'headrace_invalid_values_total{model="digits",version="1",tensor="image",problem="above",action="refused"}'
            assert f"{labels} 128" in metrics(server.http_address)

        await asyncio.to_thread(talk)


async def test_values_that_are_counted_are_answered(tmp_path: Path) -> None:
    async with serve_in_process(digits(tmp_path, 'limits = "reference"\n'), http="127.0.0.1:0") as server:

        def talk() -> None:
            with triton.InferenceServerClient(server.grpc_addresses[0]) as stub:
                assert infer(stub, BAD).shape == (2,)
            # Of the 64 elements the reference watches 19 by themselves.
            assert 'tensor="image",problem="above",action="counted"} 38' in metrics(server.http_address)

        await asyncio.to_thread(talk)


async def test_limits_of_no_reference_are_said_at_load(tmp_path: Path) -> None:
    models = digits(tmp_path, 'limits = "reference"\n')
    (models / "digits" / "1" / "drift.msgpack").unlink()
    async with serve_in_process(models) as server:
        (entry,) = server.models.index()
        assert "limits 'reference': expected drift.msgpack" in entry.reason
