"""A real Prometheus for tests, with the rules of deploy/prometheus; and what is asked of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus"

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus (Debian: prometheus)")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the program promtool (Debian: prometheus)")

Labels = tuple[tuple[str, str], ...]


class Prometheus:
    """One that runs. Its calls block: from a thread."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer. Raises AssertionError with Prometheus's own words where it refuses."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> dict[Labels, float]:
        """The values of an instant vector now, by their labels without the name."""
        found = self.get("query", query=expression)["result"]
        return {tuple(sorted((k, v) for k, v in each["metric"].items() if k != "__name__")): float(each["value"][1]) for each in found}

    def total(self, expression: str) -> float:
        return sum(self.query(expression).values())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@asynccontextmanager
async def prometheus(directory: Path, targets: Iterable[str], rules: Sequence[str] = ()) -> AsyncIterator[Prometheus]:
    """Scrapes the targets and evaluates these rules (the text of files); ready when it is entered."""
    rule_files = []
    for number, text in enumerate(rules):
        rule_files.append(directory / f"rules{number}.yml")
        rule_files[-1].write_text(text)
    config = {
        # A scrape may take as long as its interval; one that takes longer makes all series of its server stale for a while.
        "global": {"scrape_interval": "5s", "scrape_timeout": "5s", "evaluation_interval": "2s"},
        "rule_files": [str(each) for each in rule_files],
        "scrape_configs": [{"job_name": "headrace", "static_configs": [{"targets": list(targets)}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # which is YAML as well
    address = f"127.0.0.1:{_free_port()}"
    with (directory / "prometheus.log").open("wb") as log:
        process = _start(directory, address, log)
        try:
            async with asyncio.timeout(60):
                while not await asyncio.to_thread(_is_ready, address):
                    assert process.poll() is None, (directory / "prometheus.log").read_text()
                    await asyncio.sleep(0.05)
            yield Prometheus(address)
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 30)


def _start(directory: Path, address: str, log: BinaryIO) -> subprocess.Popen[bytes]:
    storage, config = directory / "tsdb", directory / "prometheus.yml"
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={storage}", f"--web.listen-address={address}"]
    return subprocess.Popen(["prometheus", *arguments], stdout=log, stderr=log)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready"):
            return True
    except OSError:
        return False
