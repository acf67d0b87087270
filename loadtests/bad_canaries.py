"""Versions on trial that must not pass, and the story that the audit log tells of them.

    python -m loadtests.bad_canaries [--model magika=FILE.onnx] [--percent 20] [--clients 4] [--seconds 60]

A server in watch mode serves the model (the generated mlp without --model) under steady load, with canaries configured. Then it is
given, one after the other, versions that are made from the same model: one that answers NaN wherever the first output says one
particular class, one that does the same work twice and so takes twice as long, and last a good one. It is a failure when

- a bad one is not rolled back by itself within --seconds, which is also the probation, or the good one is not promoted;
- a call fails, or is answered by a version that is neither on trial nor serves;
- afterwards the version that was rolled back still answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
from headrace.config import SourceConfig
from headrace.plugins import load_backends, open_destination
from headrace.sources.publish import Order, publish
from onnx import helper, numpy_helper
from tritonclient.grpc import service_pb2

from loadtests.calls import INFER_PATH, infer_message, open_session, right_answer, sample_inputs
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate, free_port
from loadtests.statistics import markdown_table

INPUTS = 64
TWICE = "twice."


def answer_nan(model: onnx.ModelProto, label: int) -> onnx.ModelProto:
    """NaN in each row whose largest score is that class's."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph, output = changed.graph, changed.graph.output[0].name
    _rename_output(graph, output, "scores.")
    constants = {"label.": np.array(label, np.int64), "nan.": np.array(np.nan, _dtype(graph.output[0]))}
    graph.initializer.extend([numpy_helper.from_array(value, constant) for constant, value in constants.items()])
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["scores."], ["best."], axis=-1, keepdims=1),
            helper.make_node("Equal", ["best.", "label."], ["is_bad."]),
            helper.make_node("Where", ["is_bad.", "nan.", "scores."], [output]),
        ]
    )
    return changed


def work_twice(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same answers from twice the work: the graph and a copy of it, whose result counts as nothing.

    The copy works on min(input, largest), which is the input; by the input itself the runtime would see that both are the same.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph, output = changed.graph, changed.graph.output[0].name
    weights = {tensor.name for tensor in graph.initializer}
    copies, renamed = [], {}
    for tensor in graph.input:
        dtype = _dtype(tensor)
        largest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else np.finfo(dtype).max
        graph.initializer.append(numpy_helper.from_array(np.array(largest, dtype), f"{TWICE}{tensor.name}.largest"))
        copies.append(helper.make_node("Min", [tensor.name, f"{TWICE}{tensor.name}.largest"], [f"{TWICE}{tensor.name}"]))
        renamed[tensor.name] = f"{TWICE}{tensor.name}"
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{TWICE}{node.name}" if node.name else ""
        for names in (copy.input, copy.output):
            for position, name in enumerate(names):
                if name and name not in weights:
                    names[position] = renamed.get(name, f"{TWICE}{name}")
        copies.append(copy)
    _rename_output(graph, output, "once.")
    graph.initializer.append(numpy_helper.from_array(np.array(0, _dtype(graph.output[0])), f"{TWICE}nothing"))
    graph.node.extend(copies)
    graph.node.append(helper.make_node("Mul", [f"{TWICE}{output}", f"{TWICE}nothing"], [f"{TWICE}ignored"]))
    graph.node.append(helper.make_node("Add", ["once.", f"{TWICE}ignored"], [output]))
    return changed


def _dtype(tensor: onnx.ValueInfoProto) -> Any:
    return helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def _rename_output(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.output, node.input):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new


@dataclass(frozen=True, slots=True)
class Story:
    """What the audit log tells of one version."""

    lines: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, path: Path, version: int) -> Story:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return cls([line for line in lines if line["version"] == version])

    def find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["event"] == event), None)

    def __str__(self) -> str:
        return "\n".join(f"  {line['at']}  {line['event']:<12} {line['who']:<8} {line['reason']}" for line in self.lines)


class Clients:
    """Steady calls. Owns what was answered by which version, and what was refused."""

    def __init__(self, address: str, messages: Sequence[bytes], count: int) -> None:
        self.answered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._stop = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(address)
        self._messages = messages
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    async def _run(self, number: int) -> None:
        call = self._channel.unary_unary(INFER_PATH)
        while not self._stop.is_set():
            number += 1
            try:
                answer = await call(self._messages[number % len(self._messages)])
            except grpc.aio.AioRpcError as error:
                self.failed[f"{error.code().name}: {error.details()}"] += 1
            else:
                self.answered[service_pb2.ModelInferResponse.FromString(answer).model_version] += 1

    async def close(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._channel.close()


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def until_told(audit: Path, version: int, event: str, seconds: float) -> bool:
    return await until(lambda: Story.of(audit, version).find(event) is not None, seconds)


async def try_versions(
    arguments: argparse.Namespace,
    server: ServerProcess,
    folder: Path,
    name: str,
    model: onnx.ModelProto,
    messages: Sequence[bytes],
    label: int,
) -> list[str]:
    """Prints a table and the stories; returns what was not as it must be."""
    cases = (
        ("NaN for one class", answer_nan(model, label), "rolled_back"),
        ("twice as slow", work_twice(model), "rolled_back"),
        ("a good one", model, "promoted"),
    )
    audit, failures, rows, stories = folder / "audit.jsonl", [], [], []
    clients = Clients(server.address, messages, arguments.clients)
    serving = "1"
    try:
        await until(lambda: clients.answered["1"] > 50, 30)
        for version, (kind, changed, wanted) in enumerate(cases, start=2):
            artifact = folder / f"{version}.onnx"
            artifact.write_bytes(changed.SerializeToString())
            destination = open_destination(str(folder / "models"), SourceConfig())
            await asyncio.to_thread(publish, Order(artifact, name), destination, load_backends())
            clients.answered.clear()
            began = time.monotonic()
            has_ended = await until_told(audit, version, wanted, 2 * arguments.seconds)
            took, share = time.monotonic() - began, clients.answered[str(version)]
            story = Story.of(audit, version)
            stories.append(f"{kind} (version {version}):\n{story}")
            strangers = set(clients.answered) - {serving, str(version)}
            if not has_ended:
                failures.append(f"{kind}: expected to be {wanted} within {2 * arguments.seconds:.0f} s")
            if strangers:
                failures.append(f"{kind}: answered by versions {', '.join(sorted(strangers))}")
            serving = str(version) if wanted == "promoted" else serving
            await asyncio.sleep(0.5)
            clients.answered.clear()
            await asyncio.sleep(1.0)
            if set(clients.answered) != {serving}:
                failures.append(f"{kind}: afterwards answered by {dict(clients.answered)}, expected {serving} alone")
            end = story.find(wanted)
            rows.append([kind, wanted if has_ended else "-", f"{took:.1f}", str(share), end["reason"] if end else ""])
    finally:
        await clients.close()
    failures += [f"{count} calls failed: {text}" for text, count in clients.failed.items()]
    print(markdown_table(["version", "came to be", "seconds", "answers it gave", "reason"], rows))
    print("\n" + "\n".join(stories))
    return failures


def run(arguments: argparse.Namespace, name: str, file: Path | None) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="canaries-") as directory:
        folder = Path(directory)
        path = write_repository(folder / "models", {name: file})[name]
        model, session = onnx.load(path), open_session(path)
        (folder / "models" / name / "model.toml").write_text(
            f'[rollout]\nmode = "canary"\npercent = {arguments.percent}\nprobation_s = {arguments.seconds}\n'
        )
        rng = np.random.default_rng(arguments.seed)
        inputs = [sample_inputs(session, 1, rng) for _ in range(INPUTS)]
        scores = [next(iter(right_answer(session, each).values())) for each in inputs]
        label = Counter(int(each.argmax()) for each in scores).most_common(1)[0][0]
        port = free_port(2)
        command = [
            sys.executable,
            "-m",
            "headrace.cli",
            "serve",
            "--models",
            str(folder / "models"),
            "--audit-log",
            str(folder / "audit.jsonl"),
        ]
        command += ["--grpc", f"127.0.0.1:{port}", "--http", f"127.0.0.1:{port + 1}"]
        server = ServerProcess(command, address=f"127.0.0.1:{port}", cores=(arguments.server_core,), log=folder / "server.log")
        with server:
            server.wait_ready([name])
            messages = [infer_message(name, each) for each in inputs]
            return asyncio.run(try_versions(arguments, server, folder, name, model, messages, label))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="loadtests.bad_canaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models_argument(parser)
    parser.add_argument("--percent", type=float, default=20.0, help="of the requests that a canary answers")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="of probation")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    exit_on_terminate()
    failures = []
    for name, file in selected_models(parser, arguments).items():
        print(f"## {name}\n")
        try:
            failures += [f"{name}: {failure}" for failure in run(arguments, name, file)]
        except ServerFailed as error:
            failures.append(f"{name}: {error}")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
