"""Load on a model whose versions change: calls that judge which version answered, and the process that publishes them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from google.protobuf.message import DecodeError
from headrace.plugins import load_backends
from tritonclient.grpc import service_pb2

from loadtests.calls import grpc_frame
from loadtests.encoded_calls import EncodedCall, is_message
from loadtests.open_loop import run_closed_loop
from loadtests.process import ServerFailed, pinned
from loadtests.publisher import Publisher
from loadtests.service_level import Results
from loadtests.variants import Answers, Verdict, make_variants
from loadtests.wire_client import Client

REMEMBERED = 4096
READY = 60.0
PATIENCE = 30.0
"""Seconds for the last version published to answer. Loading and warming up take one or two."""


@dataclass(slots=True)
class SwapLoad:
    """Owns which versions answered, and which were published."""

    answers: Answers
    repository: Path
    staging: Path
    artifacts: Sequence[Path]
    answered: Counter[int] = field(default_factory=Counter)
    published: set[int] = field(default_factory=lambda: {1})
    _right: dict[tuple[int, bytes], int] = field(default_factory=dict)

    @classmethod
    def prepare(cls, model: str, path: Path, place: Path, seed: int, settings: str) -> Self:
        """A repository with version 1. Raises ValueError for a model of which no other version can be told apart."""
        answers, artifacts = make_variants(model, path, place / "variants", seed)
        load = cls(answers, place / "models", place / "staging", artifacts)
        publisher = Publisher(load.repository, load.staging, model, artifacts, load_backends())
        publisher.stage(1)
        publisher.commit(1)
        if settings:
            (load.repository / model / "model.toml").write_text(settings)
        return load

    @property
    def calls(self) -> list[EncodedCall]:
        return [EncodedCall(grpc_frame(message), partial(self._is_right, number)) for number, message in enumerate(self.answers.messages)]

    def _is_right(self, number: int, body: bytes) -> bool:
        """Exactly the answer of the version that the response names."""
        known = self._right.get((number, body))
        if known is None:
            known = self._judge(number, body)
            if len(self._right) < REMEMBERED:
                self._right[number, body] = known
        self.answered[known] += 1
        return known > 0

    def _judge(self, number: int, body: bytes) -> int:
        """The version, 0 where the answer is not its."""
        if not is_message(body):
            return 0
        try:
            named = service_pb2.ModelInferResponse.FromString(body[5:]).model_version
        except DecodeError:
            return 0
        if not named.isdecimal():
            return 0
        return int(named) if self.answers.judge(int(named), number, body[5:]) in (Verdict.EQUAL, Verdict.CLOSE) else 0

    @contextmanager
    def publishing(self, count: int, every: float, cores: Sequence[int]) -> Iterator[None]:
        """Versions from 2 on, one every so many seconds from the beginning of the block; they are staged before it. Waits for the last."""
        command = [sys.executable, "-m", "loadtests.publisher", str(self.repository), str(self.staging), self.answers.model]
        command += [*map(str, self.artifacts), "--first", "2", "--count", str(count), "--every", str(every)]
        with subprocess.Popen(pinned(command, cores), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if process.stdout.readline().strip() != "staged":
                    raise ServerFailed("the publisher ended before it had staged its versions")
                process.stdin.write("\n")
                process.stdin.flush()
                yield
                said, _ = process.communicate(timeout=READY)
            except BaseException:
                process.kill()
                raise
        self.published |= {int(line.split()[1]) for line in said.splitlines() if line.startswith("published ")}
        if process.returncode:
            raise ServerFailed(f"the publisher ended with exit code {process.returncode}")

    def ask_newest(self, client: Client) -> Results | None:
        """Calls until the last version published answers, or the patience is at its end; the last few of them."""
        until, results = time.monotonic() + PATIENCE, None
        while not self.answered[max(self.published)] and time.monotonic() < until:
            results = run_closed_loop(client, self.calls, 1, 0.1)
        return results

    def judge(self) -> list[str]:
        """What must not be. Another version than the last that never answered was overtaken by a newer one."""
        failures = [f"version {v} answered and was never published" for v in sorted(self.answered) if v and v not in self.published]
        if not self.answered[max(self.published)]:
            failures.append(f"version {max(self.published)}, the last published, did not answer within {PATIENCE:g} s")
        return failures

    def summary(self) -> str:
        new = self.published - {1}
        return f"{len(new)} versions published, {sum(1 for version in new if self.answered[version])} of them answered"
