"""Every kind of bad publication while a model is served, one after another: the version that serves must not notice.

    python -m loadtests.bad_publications [--list-command 'headrace models list --json ...']

A server watches a repository; calls go on without a pause and every answer is judged, as in hot_swap. Each case puts something bad
where the next version belongs, or takes the repository away. Then it must hold that

- no call failed, and each was answered exactly by a version that was good;
- the reason stands in RepositoryIndex and in the server's log, and in what --list-command prints (JSON), where one is given;
- a good version published afterwards is taken up. The bad one is still there then, unless it makes the whole model unreadable.

A directory that is copied by hand for ten seconds must be left alone until it is whole, and then serve. A version with other inputs
than the one before may be refused or may serve; either way calls that fit the version that serves are answered. Exit code 1 when
something was not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import tritonclient.grpc as triton
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from headrace.plugins import load_backends

from loadtests.calls import WrongAnswer, check_answer, open_session, right_answer, sample_inputs
from loadtests.contestants import HEADRACE, Contestant
from loadtests.models import MLP, make_mlp
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate
from loadtests.publisher import Publisher
from loadtests.statistics import markdown_table
from loadtests.traffic import Record, traffic
from loadtests.variants import Answers, make_variants

PLAIN, SIGNED, CHANGED = "plain", "signed", "changed"
SETTLE = 2.0
OPTIONS = f"--model-control watch --settle-s {SETTLE:g} --poll-interval-s 1"
PATIENCE = 30.0
COPY_SECONDS = 10
CONCURRENCY = 2


# -- what can be wrong with a version directory ------------------------------------------------------------------------


def truncate(version: Path) -> None:
    file = version / "model.onnx"
    os.truncate(file, file.stat().st_size // 2)


def change_a_byte(version: Path) -> None:
    file = version / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def add_a_file(version: Path) -> None:
    (version / "extra.bin").write_bytes(b"not in the manifest")


def replace_by_rubbish(version: Path) -> None:
    (version / "manifest.json").unlink()
    (version / "model.onnx").write_bytes(b"this is no model" * 64)


def make_unreadable(version: Path) -> None:
    """Root reads everything; a link to itself not even root."""
    (version / "manifest.json").unlink()
    if os.geteuid():
        version.chmod(0)
        return
    (version / "model.onnx").unlink()
    (version / "model.onnx").symlink_to("model.onnx")


def keep_as_is(version: Path) -> None:
    """What is wrong with it was done before."""


@dataclass(frozen=True, slots=True)
class Case:
    """`reason`: what the shown reason must contain."""

    kind: str
    spoil: Callable[[Path], None]
    reason: str
    model: str = PLAIN


CASES = (
    Case("truncated file", truncate, "bytes"),
    Case("wrong digest", change_a_byte, "sha256"),
    Case("bad signature", keep_as_is, "signature", SIGNED),
    Case("file not in the manifest", add_a_file, "not in manifest.json"),
    Case("invalid ONNX, no manifest", replace_by_rubbish, "model.onnx"),
    Case("unreadable directory", make_unreadable, "cannot be read"),
)


@dataclass(slots=True)
class Outcome:
    kind: str
    calls: int = 0
    failed: int = 0
    reason: str = ""
    recovery: float = float("nan")
    """Seconds until a good version published afterwards answered."""
    failures: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        return [self.kind, str(self.calls), str(self.failed), f"{self.recovery:.1f}", self.reason or "-", "; ".join(self.failures) or "ok"]


# -- where reasons are shown -------------------------------------------------------------------------------------------


def reason_in_index(rows: Sequence[tuple[str, str, str]], model: str, version: int, wanted: str) -> str:
    """Of a version or its model, among (model, version, reason); "" while there is none. Without a number only its words count."""
    fitting = (reason for name, number, reason in rows if name == model and (not version or number in ("", str(version))))
    return next((reason for reason in fitting if wanted in reason), "")


def is_logged(lines: Sequence[str], reason: str) -> bool:
    """Whether a line of a JSON log gives that reason; the index says before it whose reason it is."""
    return any(told and told in reason for told in map(_logged_reason, lines))


def _logged_reason(line: str) -> str:
    try:
        return str(json.loads(line).get("reason", ""))
    except (ValueError, AttributeError):
        return ""


def is_listed(table: object, reason: str) -> bool:
    """Whether a string anywhere in parsed JSON gives that reason."""
    return any(text and (text in reason or reason in text) for text in _texts(table) if len(text) > 10)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


# -- the trials --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """Owns the highest number that was given to a version of each model."""

    server: ServerProcess
    repository: Path
    publishers: dict[str, Publisher]
    records: dict[str, Record]
    keys: dict[str, Path | None]
    strangers_key: Path
    list_command: str | None
    numbers: dict[str, int] = field(default_factory=lambda: {PLAIN: 1, SIGNED: 1, CHANGED: 1})

    def next_version(self, model: str) -> int:
        self.numbers[model] += 1
        return self.numbers[model]

    def index(self) -> list[tuple[str, str, str]]:
        with triton.InferenceServerClient(self.server.address) as client:
            rows = client.get_model_repository_index(client_timeout=10.0).models
        return [(row.name, row.version, row.reason) for row in rows]

    async def await_reason(self, model: str, version: int, wanted: str) -> str:
        return await _poll(lambda: reason_in_index(self.index(), model, version, wanted)) or ""

    def log_lines(self, offset: int) -> list[str]:
        with self.server.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace").splitlines()

    def check_shown(self, outcome: Outcome, offset: int) -> None:
        if not outcome.reason:
            outcome.failures.append("no reason in RepositoryIndex")
            return
        if not is_logged(self.log_lines(offset), outcome.reason):
            outcome.failures.append("reason not in the log")
        if self.list_command is not None:
            command = shlex.split(self.list_command.format(address=self.server.address))
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            if done.returncode:
                outcome.failures.append(f"the list command ended with {done.returncode}: {done.stderr.strip()[-200:]}")
            elif not is_listed(json.loads(done.stdout), outcome.reason):
                outcome.failures.append("reason not in the list")

    async def recover(self, outcome: Outcome, model: str) -> None:
        """Publish a good version and wait for its answer."""
        version = self.next_version(model)
        self.publishers[model].stage(version, self.keys[model])
        at = self.publishers[model].commit(version)
        if await self.records[model].wait_for(version, PATIENCE):
            outcome.recovery = self.records[model].first_answers[version] - at
        else:
            outcome.failures.append(f"a good version published afterwards did not answer within {PATIENCE:g} s")


async def _poll(look: Callable[[], str]) -> str | None:
    """The first thing that `look` finds; None when the time is up. It is called in a thread."""
    until = time.monotonic() + PATIENCE
    while True:
        found = await asyncio.to_thread(look)
        if found or time.monotonic() > until:
            return found or None
        await asyncio.sleep(0.2)


async def observe(bench: Bench, kind: str, trial: Callable[[Bench, Outcome], Awaitable[None]]) -> Outcome:
    """Run the trial and add what the calls under way saw of it."""
    outcome = Outcome(kind)
    before = {model: dict(record.troubles) for model, record in bench.records.items()}
    since = time.monotonic()
    await trial(bench, outcome)
    await asyncio.sleep(0.5)
    for model, record in bench.records.items():
        calls, failed = record.count(since, float("inf"))
        outcome.calls += calls
        outcome.failed += failed
        if not calls:
            outcome.failures.append(f"{model}: no call was answered meanwhile")
        new = {text: count - before[model].get(text, 0) for text, count in record.troubles.items()}
        outcome.failures += [f"{model}: {count} times: {text}" for text, count in new.items() if count]
    return outcome


async def try_version(case: Case, bench: Bench, outcome: Outcome) -> None:
    version, publisher, offset = bench.next_version(case.model), bench.publishers[case.model], bench.server.log.stat().st_size
    staged = publisher.stage(version, bench.strangers_key if case.model == SIGNED else bench.keys[case.model])
    case.spoil(staged)
    publisher.commit(version)
    outcome.reason = await bench.await_reason(case.model, version, case.reason)
    bench.check_shown(outcome, offset)
    await bench.recover(outcome, case.model)
    _remove(bench.repository / case.model / str(version))
    if version in bench.records[case.model].first_answers:
        outcome.failures.append(f"the bad version {version} answered")


def _remove(directory: Path) -> None:
    directory.chmod(0o755)
    shutil.rmtree(directory)


async def copy_slowly(bench: Bench, outcome: Outcome) -> None:
    version = bench.next_version(PLAIN)
    staged = bench.publishers[PLAIN].stage(version) / "model.onnx"
    content = staged.read_bytes()
    target = bench.repository / PLAIN / str(version)
    target.mkdir()
    step = -(-len(content) // COPY_SECONDS)
    with (target / "model.onnx").open("wb") as file:
        for start in range(0, len(content), step):
            file.write(content[start : start + step])
            file.flush()
            copied = time.monotonic()
            await asyncio.sleep(1.0)
    record = bench.records[PLAIN]
    if not await record.wait_for(version, PATIENCE):
        outcome.failures.append(f"it did not answer within {PATIENCE:g} s of being whole")
        return
    outcome.recovery = record.first_answers[version] - copied
    early = [text for name, number, text in bench.index() if (name, number) == (PLAIN, str(version)) and text]
    outcome.reason = "left alone until whole, then served"
    outcome.failures += [f"was tried too early: {text}" for text in early]


async def empty_repository(bench: Bench, outcome: Outcome) -> None:
    aside = bench.repository.with_name("aside")
    aside.mkdir()
    offset = bench.server.log.stat().st_size
    moved = [path.name for path in bench.repository.iterdir()]
    for name in moved:
        (bench.repository / name).rename(aside / name)
    try:
        outcome.reason = await bench.await_reason(PLAIN, 0, "source")
        bench.check_shown(outcome, offset)
    finally:
        for name in moved:
            (aside / name).rename(bench.repository / name)
    await bench.recover(outcome, PLAIN)


async def move_repository_away(bench: Bench, outcome: Outcome) -> None:
    offset = bench.server.log.stat().st_size
    elsewhere = bench.repository.with_name("elsewhere")
    bench.repository.rename(elsewhere)
    try:
        outcome.reason = await bench.await_reason(PLAIN, 0, "source")
        bench.check_shown(outcome, offset)
    finally:
        elsewhere.rename(bench.repository)
    await bench.recover(outcome, PLAIN)


async def change_signature(bench: Bench, outcome: Outcome) -> None:
    """Its calls are made one at a time here: those of the old version rightly fail once the new one serves."""
    publisher, version = bench.publishers[CHANGED], bench.next_version(CHANGED)
    file = publisher.artifacts[0].with_name("other") / "model.onnx"
    file.parent.mkdir()
    file.write_bytes(with_other_input().SerializeToString())
    other = Publisher(publisher.repository, publisher.staging, CHANGED, [file], publisher.backends)
    other.stage(version)
    at = other.commit(version)
    found = await _poll(lambda: _live_or_reason(bench, version))
    if found is None:
        outcome.failures.append(f"neither live nor refused within {PATIENCE:g} s")
        return
    serving = file if found == "live" else publisher.artifacts[0]
    outcome.reason = f"went live after {time.monotonic() - at:.1f} s, with its own inputs" if found == "live" else found
    session = open_session(serving)
    inputs = sample_inputs(session, 1, np.random.default_rng(0))
    try:
        await asyncio.to_thread(check_answer, bench.server.address, CHANGED, inputs, right_answer(session, inputs))
    except (WrongAnswer, triton.InferenceServerException) as error:
        outcome.failures.append(f"the serving version does not answer: {error}")


def with_other_input() -> onnx.ModelProto:
    """The perceptron with another name for its input."""
    model = make_mlp()
    model.graph.input[0].name = "z"
    model.graph.node[0].input[0] = "z"
    onnx.checker.check_model(model)
    return model


def _live_or_reason(bench: Bench, version: int) -> str:
    with triton.InferenceServerClient(bench.server.address) as client:
        if client.is_model_ready(CHANGED, str(version), client_timeout=5.0):
            return "live"
    return reason_in_index(bench.index(), CHANGED, version, CHANGED)


# -- the whole ---------------------------------------------------------------------------------------------------------


def make_key(path: Path) -> bytes:
    """A new private key at `path`; its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)


def lay_out(scratch: Path) -> tuple[dict[str, Publisher], dict[str, Answers], dict[str, Path | None]]:
    """Three models with a first version each, the one signed."""
    repository, staging = scratch / "models", scratch / "staging"
    repository.mkdir()
    staging.mkdir()
    original = scratch / "original.onnx"
    original.write_bytes(make_mlp().SerializeToString())
    keys: dict[str, Path | None] = {PLAIN: None, SIGNED: scratch / "ours.pem", CHANGED: None}
    public = make_key(scratch / "ours.pem")
    publishers, answers = {}, {}
    for model, key in keys.items():
        answers[model], artifacts = make_variants(model, original, scratch / f"{MLP}_{model}", seed=1)
        publishers[model] = Publisher(repository, staging, model, artifacts, load_backends())
        publishers[model].stage(1, key)
        publishers[model].commit(1)
    (repository / SIGNED / "public.pem").write_bytes(public)
    (repository / SIGNED / "model.toml").write_text('signature_policy = "require"\nsignature_key = "public.pem"\n')
    return publishers, answers, keys


TRIALS: tuple[tuple[str, Callable[[Bench, Outcome], Awaitable[None]]], ...] = (
    *((case.kind, partial(try_version, case)) for case in CASES),
    ("other inputs than before", change_signature),
    (f"copied by hand over {COPY_SECONDS} s", copy_slowly),
    ("repository emptied", empty_repository),
    ("repository moved away", move_repository_away),
)


async def run_trials(bench: Bench, loads: Sequence[tuple[Answers, int]]) -> list[Outcome]:
    outcomes = []
    async with traffic(bench.server.address, loads, seed=1) as records:
        bench.records.update((record.model, record) for record in records)
        for kind, trial in TRIALS:
            outcomes.append(await observe(bench, kind, trial))
            print(f"{kind}: {'; '.join(outcomes[-1].failures) or 'ok'}", flush=True)
    return outcomes


def main() -> int:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.bad_publications", description=description, formatter_class=formatter)
    parser.add_argument("--list-command", help="prints models, versions and reasons as JSON; {address} is the server's")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    arguments = parser.parse_args()
    exit_on_terminate()
    os.sched_setaffinity(0, {arguments.client_core})
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        publishers, answers, keys = lay_out(scratch)
        make_key(scratch / "theirs.pem")
        contestant = Contestant("headrace", f"{HEADRACE} {OPTIONS}")
        server = contestant.server(scratch / "models", PLAIN, cores=[arguments.server_core], log=scratch / "server.log")
        try:
            with server:
                server.wait_ready(list(publishers))
                bench = Bench(server, scratch / "models", publishers, {}, keys, scratch / "theirs.pem", arguments.list_command)
                outcomes = asyncio.run(run_trials(bench, [(answers[PLAIN], CONCURRENCY), (answers[SIGNED], CONCURRENCY)]))
        except ServerFailed as error:
            print(error)
            return 1
    header = ["kind", "calls", "failed", "good one after s", "reason as shown", "judged"]
    print("\n" + markdown_table(header, [outcome.row() for outcome in outcomes]))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
