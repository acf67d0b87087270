"""Labels for what a running server has answered: joined by request id, counted by version, gone with it."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as client
from digits_requests import IMAGES, LABELS, ask
from headrace import cli
from headrace.errors import Code
from headrace.feedback.feedbacks import Joined, Labelled
from headrace.rpc.admin_client import AdminClient, CallFailed, Tls
from headrace.testing import serve_in_process
from sklearn.datasets import load_diabetes

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
Capture = pytest.CaptureFixture[str]
ROWS = [1, 5, 40, 1, 64]
TRANSPORTS = pytest.mark.parametrize("transport", ["native", "grpcio"])


def repository(directory: Path, model: str = "digits", settings: str = "") -> Path:
    shutil.copytree(EXAMPLES / model, directory / model)
    with (directory / model / "model.toml").open("a") as toml:
        toml.write(f"\n[feedback]\nenabled = true\n{settings}")
    return directory


def labels(rows: list[int]) -> list[Labelled]:
    """Of the requests that `ask` sends."""
    starts = np.cumsum([0, *rows])
    return [Labelled(f"r{i}", classes=LABELS[starts[i] : starts[i] + count].tolist()) for i, count in enumerate(rows)]


def send(address: str, requests: list[Labelled], model: str = "digits", version: int = 0) -> Joined:
    with AdminClient(address, Tls(), 30.0) as admin:
        return admin.send_feedback(model, requests, version)


@TRANSPORTS
async def test_labels_give_the_accuracy_that_clients_can_compute_themselves(tmp_path: Path, transport: str) -> None:
    async with serve_in_process(repository(tmp_path), transport=transport) as server:
        address = server.grpc_addresses[0]
        answers = await asyncio.to_thread(ask, address, ROWS)
        joined = await asyncio.to_thread(send, address, labels(ROWS))
        assert (joined.outcomes["matched"], joined.rows, joined.problems) == (5, sum(ROWS), [])
        (report,) = server.feedbacks.report("digits", 1)
        scores = np.concatenate([answer.as_numpy("probabilities") for answer in answers])
        is_right = scores.argmax(axis=1) == LABELS[: sum(ROWS)]
        right = report.classification
        assert (report.output, right.rows, right.correct) == ("probabilities", sum(ROWS), np.count_nonzero(is_right))
        assert sum(each.rows * each.confidence for each in right.bins) == pytest.approx(scores.max(axis=1).sum(), rel=1e-5)
        assert dict(report.classes)[3] == (EXAMPLES / "digits" / "labels.txt").read_text().split("\n")[3]
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{server.http_address}/metrics").read().decode())
        assert f'headrace_online_accuracy{{model="digits",version="1",window="all"}} {is_right.mean()}' in text
        assert 'headrace_feedback_requests_total{model="digits",outcome="matched"} 5.0' in text


@TRANSPORTS
async def test_what_cannot_be_joined_is_counted_and_said(tmp_path: Path, transport: str) -> None:
    async with serve_in_process(repository(tmp_path, settings="keep_rows = 100\n"), transport=transport) as server:
        address = server.grpc_addresses[0]
        await asyncio.to_thread(ask, address, [60, 60, 2])  # the first has to go for the second
        items = [
            Labelled("r0", classes=[1] * 60), Labelled("r1", classes=[1] * 59),
            Labelled("r2", names=["3", "nothing"]),
            Labelled("r2", values=[1.0, 2.0]), Labelled("nobody", classes=[1]), Labelled("r2", classes=[1, 2]),
            Labelled("r2", classes=[1, 2]),
        ]  # fmt: skip
        joined = await asyncio.to_thread(send, address, items)
        assert joined.outcomes == {"matched": 1, "unknown": 1, "expired": 1, "duplicate": 1, "invalid": 3}
        assert [problem.partition(": ")[0] for problem in joined.problems] == ["request 'r1'", "request 'r2'", "request 'r2'"]
        assert "expected a label for each of 60 rows, got 59" in joined.problems[0]
        assert "unknown class 'nothing'" in joined.problems[1]
        for requests, version, code in (([Labelled("r")], 0, Code.INVALID_ARGUMENT), ([], 7, Code.FAILED_PRECONDITION)):
            with pytest.raises(CallFailed) as refused:
                await asyncio.to_thread(send, address, requests, "digits", version)
            assert refused.value.code is code


async def test_a_model_that_does_not_want_labels_keeps_nothing(tmp_path: Path) -> None:
    async with serve_in_process(EXAMPLES) as server:
        await asyncio.to_thread(ask, server.grpc_addresses[0], [1])
        with pytest.raises(CallFailed, match=r"enabled = true in \[feedback\] of its model.toml"):
            await asyncio.to_thread(send, server.grpc_addresses[0], labels([1]))


async def test_a_version_that_goes_takes_its_state_along_and_the_next_begins_anew(tmp_path: Path) -> None:
    async with serve_in_process(repository(tmp_path), poll_interval=0.1, settle=0) as server:
        address = server.grpc_addresses[0]
        await asyncio.to_thread(ask, address, [4])
        shutil.copytree(EXAMPLES / "digits" / "1", tmp_path / "digits" / "2")
        async with asyncio.timeout(30):
            while [each.version for each in server.feedbacks.reports()] != [2]:
                await asyncio.sleep(0.02)
        joined = await asyncio.to_thread(send, address, labels([4]))
        assert joined.outcomes["unknown"] == 1
        await asyncio.to_thread(ask, address, [4])
        assert (await asyncio.to_thread(send, address, labels([4]))).outcomes["matched"] == 1
        (report,) = server.feedbacks.reports()
        assert (report.version, report.classification.rows) == (2, 4)


async def test_errors_of_a_regression(tmp_path: Path) -> None:
    features, target = (each[:50] for each in load_diabetes(return_X_y=True, scaled=False))
    sex = np.where(features[:, 1:2] == 1, b"female", b"male").astype(object)
    measurements = np.delete(features, 1, axis=1).astype(np.float32)

    def call(address: str) -> Any:
        inputs = []
        for name, array, datatype in (("sex", sex, "BYTES"), ("measurements", measurements, "FP32")):
            inputs.append(client.InferInput(name, array.shape, datatype))
            inputs[-1].set_data_from_numpy(array)
        with client.InferenceServerClient(address) as stub:
            return stub.infer("diabetes", inputs, request_id="all").as_numpy("progression")[:, 0]

    (tmp_path / "toml").mkdir()
    shutil.copytree(EXAMPLES / "diabetes", tmp_path / "models" / "diabetes")
    (tmp_path / "models" / "diabetes" / "model.toml").write_text("[feedback]\nenabled = true\n")
    async with serve_in_process(tmp_path / "models") as server:
        predicted = await asyncio.to_thread(call, server.grpc_addresses[0])
        joined = await asyncio.to_thread(send, server.grpc_addresses[0], [Labelled("all", values=target.tolist())], "diabetes")
        assert joined.outcomes["matched"] == 1
        (report,) = server.feedbacks.reports()
        assert report.regression.mae == pytest.approx(np.abs(predicted - target).mean(), rel=1e-5)
        assert report.regression.bias == pytest.approx((predicted - target).mean(), rel=1e-4)


async def test_the_command_sends_files_of_labels_and_shows_what_they_say(tmp_path: Path, capsys: Capture) -> None:
    def headrace(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in ("feedback", *arguments)])
        return code, *capsys.readouterr()

    csv, lines, bad = tmp_path / "labels.csv", tmp_path / "labels.jsonl", tmp_path / "bad.jsonl"
    csv.write_text("id,label\n" + "".join(f"r0,{label}\n" for label in LABELS[:30]))
    lines.write_text(json.dumps({"id": "r1", "label": LABELS[30:50].tolist()}) + "\n" + json.dumps({"id": "x", "label": "7"}) + "\n")
    bad.write_text('{"id": 3}\n')
    async with serve_in_process(repository(tmp_path / "models")) as server:
        address = server.grpc_addresses[0]
        await asyncio.to_thread(ask, address, [30, 20])
        assert await asyncio.to_thread(headrace, "send", "digits", csv, "--url", address) == (0, "digits: 1 matched (30 rows)\n", "")
        code, out, _ = await asyncio.to_thread(headrace, "send", "digits", lines, "--url", address)
        assert (code, out) == (0, "digits: 1 matched, 1 unknown (20 rows)\n")
        code, out, _ = await asyncio.to_thread(headrace, "show", "digits", "--url", address, "--json")
        assert json.loads(out)[0]["classification"]["rows"] == 50
        code, out, err = await asyncio.to_thread(headrace, "show", "digits", "--url", address)
        assert (code, err) == (0, "")
        assert "digits:1  probabilities" in out
        assert "50 rows" in out
        code, _, err = await asyncio.to_thread(headrace, "send", "digits", bad, "--url", address)
        assert code == 2
        assert "bad.jsonl:1: expected {'id': 'a request id', 'label': …}" in err
        assert (await asyncio.to_thread(headrace, "show", "nobody", "--url", address))[0] == 1
    assert len(IMAGES) > 50
