"""The classification of outputs on a running server, asked for by the stock client, beside plain requests for the same model."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from headrace.capture.reading import read_capture
from headrace.testing import serve_in_process
from numpy.typing import NDArray
from onnx_models import identity, save
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

NAMES = ("ant", "", "cat", "dog")
SCORES = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)


def repository(directory: Path, *, datatype: str = "FP32", shape: str = "N,6", settings: str = "") -> Path:
    """One model, y = x, whose first classes have names."""
    save(identity(datatype, shape), directory / "m" / "1")
    (directory / "m" / "labels.txt").write_text("\n".join(NAMES) + "\n")
    (directory / "m" / "model.toml").write_text(settings + '[[output]]\nname = "y"\nlabels = "labels.txt"\n')
    return directory


def wanted(count: int) -> list[Any]:
    return [triton.InferRequestedOutput("y", class_count=count)]


def tensor(scores: NDArray[Any]) -> list[Any]:
    made = triton.InferInput("x", list(scores.shape), np_to_triton_dtype(scores.dtype))
    made.set_data_from_numpy(scores)
    return [made]


def ask(stub: Any, scores: NDArray[Any], count: int = 0) -> Any:
    return stub.infer("m", tensor(scores), outputs=wanted(count) if count else None).as_numpy("y")


def by_hand(scores: NDArray[Any], count: int) -> list[list[bytes]]:
    """Of each row, from a plain answer."""
    answers = []
    for row in scores.reshape(len(scores), -1):
        order = sorted(range(len(row)), key=lambda index, row=row: -row[index])[:count]  # type: ignore[misc]  # a lambda's default
        names = [f":{NAMES[i]}" if i < len(NAMES) and NAMES[i] else "" for i in order]
        answers.append([f"{row[i]:f}:{i}{name}".encode() for i, name in zip(order, names, strict=True)])
    return answers


async def talk(models: Path, work: Callable[[Any], None], **options: Any) -> None:
    async with serve_in_process(models, **options) as server:

        def with_client() -> None:
            with triton.InferenceServerClient(server.grpc_addresses[0]) as stub:
                work(stub)

        await asyncio.to_thread(with_client)


def check_one_by_one(stub: Any) -> None:
    for rows in (1, 3):
        plain = ask(stub, SCORES[:rows])
        np.testing.assert_array_equal(plain, SCORES[:rows])
        for count in (1, 3, 6, 100):
            found = ask(stub, SCORES[:rows], count)
            assert found.shape == (rows, min(count, 6))
            assert found.tolist() == by_hand(plain, count)


async def test_the_stock_client_gets_the_largest_with_their_classes_and_names(tmp_path: Path, transport: str) -> None:
    def work(stub: Any) -> None:
        check_one_by_one(stub)
        assert "classification" in stub.get_server_metadata().extensions
        (output,) = stub.get_model_config("m", as_json=True)["config"]["output"]
        assert output["label_filename"] == "labels.txt"

    await talk(repository(tmp_path), work, transport=transport)


async def test_in_one_batch_each_gets_what_it_asked_for(tmp_path: Path, transport: str) -> None:
    """Plain, one class, three and all, 1 to 3 rows each; the delay brings them together."""

    def work(stub: Any) -> None:
        def one(number: int) -> None:
            rows = SCORES[number % 50 : number % 50 + 1 + number % 3]
            count = (0, 1, 3, 100)[number % 4]
            found = ask(stub, rows, count)
            if count:
                assert found.tolist() == by_hand(rows, count)
            else:
                np.testing.assert_array_equal(found, rows)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(320)))
        stats = stub.get_inference_statistics("m").model_stats[0]
        assert stats.execution_count < stats.inference_stats.success.count, "some ran together"

    await talk(repository(tmp_path, settings="max_queue_delay_ms = 20\n"), work, transport=transport)


async def test_streams_carry_classes_too(tmp_path: Path, transport: str) -> None:
    def work(stub: Any) -> None:
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        stub.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(20):
            outputs = wanted(2) if number % 2 else None
            stub.async_stream_infer("m", tensor(SCORES[number : number + 1]), outputs=outputs, request_id=str(number))
        for number in range(20):
            result, error = answers.get(timeout=10)
            assert error is None
            rows = SCORES[number : number + 1]
            found = result.as_numpy("y")
            assert found.tolist() == (by_hand(rows, 2) if number % 2 else rows.tolist())
        stub.stop_stream()

    await talk(repository(tmp_path), work, transport=transport)


@pytest.mark.parametrize(
    ("datatype", "shape", "scores", "expected"),
    [
        ("INT64", "N,6", np.array([[1, 2**62, 2**62 + 1, 0, -5, 7]]), [[b"4611686018427387905:2:cat", b"4611686018427387904:1"]]),
        ("FP64", "N,6", np.array([[0.5, np.nan, 1e-9, 0.25, -1.0, 0.5]]), [[b"0.500000:0:ant", b"0.500000:5"]]),
        ("FP32", "N,2,3", SCORES[:4].reshape(4, 2, 3), by_hand(SCORES[:4], 2)),
        ("FP32", "6", SCORES[0], by_hand(SCORES[:1], 2)[0]),
        ("FP32", "2,3", SCORES[0].reshape(2, 3), by_hand(SCORES[:1], 2)[0]),
    ],
)
async def test_other_datatypes_and_shapes(
    tmp_path: Path, transport: str, datatype: str, shape: str, scores: NDArray[Any], expected: Sequence[Any]
) -> None:
    def work(stub: Any) -> None:
        assert ask(stub, scores, 2).tolist() == expected

    await talk(repository(tmp_path, datatype=datatype, shape=shape), work, transport=transport)


async def test_what_cannot_be_ranked_is_refused_by_name_and_the_others_are_answered(tmp_path: Path, transport: str) -> None:
    half = SCORES[:1].astype(np.float16)

    def work(stub: Any) -> None:
        with pytest.raises(
            InferenceServerException, match="output 'y': class result not available for output due to unsupported type 'FP16'"
        ):
            ask(stub, half, 2)
        with pytest.raises(InferenceServerException, match="invalid value for 'classification' parameter, expected > 0, got -1"):
            ask(stub, half, -1)
        np.testing.assert_array_equal(ask(stub, half), half)

    await talk(repository(tmp_path, datatype="FP16"), work, transport=transport)


async def test_a_capture_holds_the_scores_behind_the_classes(tmp_path: Path, transport: str) -> None:
    models, captures = repository(tmp_path / "models"), tmp_path / "captures"

    def work(stub: Any) -> None:
        assert ask(stub, SCORES[:2], 1).tolist() == by_hand(SCORES[:2], 1)

    await talk(models, work, transport=transport, capture=str(captures), capture_max_per_second=1000.0)
    (captured,) = read_capture(captures)
    np.testing.assert_array_equal(captured.outputs[0].array(), SCORES[:2])
