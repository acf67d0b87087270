"""Drift on a running server: every row counted, an alert for what changed, and a swap that mixes nothing."""

from __future__ import annotations

import asyncio
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tritonclient.grpc as client
from headrace.app import Server
from headrace.config import ServerConfig
from headrace.drift.verdict import Alert, DriftReport
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "digits"
WITHOUT_REFERENCE = shutil.ignore_patterns("drift.msgpack")
"""It is learnt instead."""
CLEAN = load_digits().data.astype(np.float32)
SETTINGS = """
[drift]
learn_rows = 600
window_rows = 400
budget = 0
"""


def make_repository(directory: Path) -> Path:
    shutil.copytree(EXAMPLE, directory / "digits", ignore=WITHOUT_REFERENCE)
    settings = directory / "digits" / "model.toml"
    settings.write_text(settings.read_text() + SETTINGS)
    return directory


def send(address: str, images: np.ndarray, requests: int, seed: int = 0) -> set[str]:
    """Requests of 8 random rows each. The versions that answered."""
    random, versions = np.random.default_rng(seed), set()
    with client.InferenceServerClient(address) as stub:
        for _ in range(requests):
            rows = images[random.integers(0, len(images), 8)]
            tensor = client.InferInput("image", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            versions.add(stub.infer("digits", [tensor]).get_response().model_version)
    return versions


def report_of(server: Server) -> DriftReport:
    report = server.models.resolve("digits", "").drift
    assert report is not None
    return report


async def test_a_server_can_leave_drift_alone() -> None:
    server = Server(ServerConfig(models=(str(EXAMPLE.parent),), grpc=("127.0.0.1:0",), http="", drift=False))
    await server.start()
    try:
        await asyncio.to_thread(send, server.grpc_addresses[0], CLEAN, 3)
        assert server.models.resolve("digits", "").drift is None
    finally:
        await server.stop()


async def until(is_so: Callable[[], bool]) -> None:
    """Rows are counted after their answers have left."""
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_mirrored_digits_are_told_from_clean_ones_and_a_swap_mixes_nothing(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    server = Server(ServerConfig(models=(str(repository),), grpc=("127.0.0.1:0",), http="127.0.0.1:0", poll_interval=0.1, settle=0))
    alerts: list[Alert] = []
    await server.start()
    try:
        server.drift.subscribe(alerts.extend)
        address = server.grpc_addresses[0]

        await asyncio.to_thread(send, address, CLEAN, 75)
        await until(lambda: report_of(server).reference is not None)
        await asyncio.to_thread(send, address, CLEAN, 150, seed=1)
        await until(lambda: len(report_of(server).history) == 3)
        report = report_of(server)
        assert (report.seen_rows, report.skipped_rows, report.dropped_rows) == (1800, 0, 0)
        assert alerts == []

        await asyncio.to_thread(send, address, np.ascontiguousarray(CLEAN[:, ::-1]), 50)
        await until(lambda: bool(alerts))
        named = {alert.feature for alert in report_of(server).alerts}
        assert {"image.0", "probabilities.confidence"} <= named
        assert any(alert.kind == "accuracy" and alert.is_raised for alert in alerts)
        metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{server.http_address}/metrics").read().decode())
        assert 'headrace_drift_alert{model="digits",version="1",side="input",tensor="image",feature="0"} 1' in metrics
        assert 'headrace_drift_window_samples{model="digits",version="1",window="tumbling"} 400' in metrics

        shutil.copytree(EXAMPLE / "1", repository / "digits" / "2", ignore=WITHOUT_REFERENCE)
        answered: set[str] = set()
        sent = 0
        while "2" not in answered:  # under load, until the new version answers
            answered |= await asyncio.to_thread(send, address, CLEAN, 5, seed=sent)
            sent += 5
            assert sent < 20_000
        second = server.models.resolve("digits", "2")
        await until(lambda: report_of(server).seen_rows == second.counters.rows())
        report = report_of(server)
        assert report.version == 2
        assert report.reference is not None
        assert report.reference.source == "version 1"
        assert 0 < report.seen_rows <= sent * 8
        assert report.totals is not None
        assert report.totals.rows == report.seen_rows
    finally:
        await server.stop()
