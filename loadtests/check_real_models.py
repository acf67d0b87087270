"""Real models served with no configuration against ONNX Runtime run directly: are the answers the same?

    python -m loadtests.check_real_models --model magika=FILE.onnx --model ocr_rec=FILE.onnx --model silero_vad=FILE.onnx

For every model but silero_vad: calls one at a time must be equal bit for bit to a direct run of the same input, also with four
rows in a call; then many calls at once, of which the server makes batches, must be equal to 1e-5. Models with free image sizes
get different ones mixed. silero_vad carries state: each sequence feeds the state of an answer into the next call, several
sequences at once, and every answer must be equal bit for bit to the direct run over the same sequence.

Mean rows a batch is from the server's ModelStatistics during the calls at once. It may well be 1.0: a server that has learnt that
a model is no faster per row in batches does not form them. So the calls at once are made again to a server whose model.toml says
that batches have eight rows and nothing else; they are filled up where fewer wait.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from loadtests.calls import (
    TOLERANCE,
    Arrays,
    answer_arrays,
    count_batches,
    difference,
    infer_inputs,
    is_bitwise_equal,
    open_session,
    right_answer,
    sample_inputs,
)
from loadtests.contestants import headrace
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, exit_on_terminate
from loadtests.statistics import markdown_table

CALL_TIMEOUT = 120.0
ROWS = 4
STATEFUL = "silero_vad"
CHUNK, CONTEXT, RATE = 512, 64, 16_000
"""silero_vad takes 32 ms of sound at 16 kHz, after the last 64 samples of the chunk before."""

Maker = Callable[[np.random.Generator, int, int], Arrays]
"""Random generator, number of the call, rows -> inputs."""


def image_maker(*sizes: tuple[int, int]) -> Maker:
    """Images of the given heights and widths, one after the other."""

    def make(rng: np.random.Generator, number: int, rows: int) -> Arrays:
        return {"x": rng.uniform(-1, 1, (rows, 3, *sizes[number % len(sizes)])).astype(np.float32)}

    return make


MAKERS: Mapping[str, Maker] = {
    "ocr_cls": image_maker((48, 192)),
    "ocr_rec": image_maker((48, 96), (48, 160), (48, 200), (48, 256), (48, 320)),
    "ocr_det": image_maker((96, 160), (160, 96), (128, 128)),
}


def maker_of(model: str, session: ort.InferenceSession) -> Maker:
    return MAKERS.get(model) or (lambda rng, _, rows: sample_inputs(session, rows, rng))


@dataclass(slots=True)
class Verdict:
    model: str
    alone: str
    """How the calls one at a time compared."""
    at_once: str
    off: float
    """The largest difference of the calls at once."""
    rows_per_batch: float
    failures: list[str] = field(default_factory=list)


class Comparison:
    """One model on one server beside its session in this process."""

    def __init__(self, client: triton.InferenceServerClient, address: str, model: str, session: ort.InferenceSession) -> None:
        self._client = client
        self._address = address
        self._model = model
        self._session = session

    async def infer(self, inputs: Arrays) -> Arrays:
        return answer_arrays(await self._client.infer(self._model, infer_inputs(inputs), client_timeout=CALL_TIMEOUT))

    async def compare(self, alone: int, at_once: int, seed: int) -> Verdict:
        rng, make = np.random.default_rng(seed), maker_of(self._model, self._session)
        singles = [make(rng, number, ROWS if number % 4 == 3 else 1) for number in range(alone)]
        equal = [is_bitwise_equal(await self.infer(inputs), right_answer(self._session, inputs)) for inputs in singles]
        verdict = await self.compare_at_once([make(rng, number, 1) for number in range(at_once)])
        verdict.alone = f"{equal.count(True)} of {alone} bitwise"
        verdict.failures += [] if all(equal) else [f"{equal.count(False)} of {alone} calls alone were not equal bit for bit"]
        return verdict

    async def compare_at_once(self, calls: Sequence[Arrays]) -> Verdict:
        expected = [right_answer(self._session, inputs) for inputs in calls]
        before = count_batches(self._address, self._model)
        answers = await asyncio.gather(*map(self.infer, calls))
        batches = count_batches(self._address, self._model) - before
        off = max(difference(got, right) for got, right in zip(answers, expected, strict=True))
        failures = [] if off <= TOLERANCE else [f"calls at once are off by {off:.2g}, expected at most {TOLERANCE:g}"]
        failures += [] if batches.rows == len(calls) else [f"ModelStatistics count {batches.rows} rows, {len(calls)} were sent"]
        # Were two right answers the same, a server that mixes them up would pass.
        closest = min(difference(one, other) for one, other in pairwise(expected))
        failures += [] if closest > TOLERANCE else ["two calls have the same right answer: mixed-up answers would not be seen"]
        return Verdict(self._model, "-", str(len(calls)), off, batches.mean, failures)

    async def compare_sequences(self, sequences: int, length: int, seed: int) -> Verdict:
        sounds = [make_sound(np.random.default_rng((seed, number)), length) for number in range(sequences)]
        expected = [self._direct_sequence(sound) for sound in sounds]
        before = count_batches(self._address, self._model)
        got = await asyncio.gather(*map(self._served_sequence, sounds))
        batches = count_batches(self._address, self._model) - before
        pairs = [pair for served, direct in zip(got, expected, strict=True) for pair in zip(served, direct, strict=True)]
        equal = [is_bitwise_equal(served, direct) for served, direct in pairs]
        off = max(difference(served, direct) for served, direct in pairs)
        spoken = np.concatenate([answer["output"].ravel() for answer in expected[0]])
        failures = [] if all(equal) else [f"{equal.count(False)} of {len(pairs)} steps were not equal bit for bit"]
        # A sequence whose answers never change would not notice a state that is lost.
        failures += [] if np.ptp(spoken) > 1e-3 else ["the sound leaves the model unmoved: nothing was checked"]
        alone = f"{equal.count(True)} of {len(pairs)} bitwise"
        return Verdict(self._model, alone, f"{sequences} x {length} steps", off, batches.mean, failures)

    def _direct_sequence(self, sound: Sequence[np.ndarray]) -> list[Arrays]:
        answers, state = [], first_state()
        for chunk in sound:
            answers.append(right_answer(self._session, step_inputs(chunk, state)))
            state = answers[-1]["stateN"]
        return answers

    async def _served_sequence(self, sound: Sequence[np.ndarray]) -> list[Arrays]:
        answers, state = [], first_state()
        for chunk in sound:
            answers.append(await self.infer(step_inputs(chunk, state)))
            state = answers[-1]["stateN"]
        return answers


def first_state() -> np.ndarray:
    return np.zeros((2, 1, 128), np.float32)


def step_inputs(chunk: np.ndarray, state: np.ndarray) -> Arrays:
    return {"input": chunk, "state": state, "sr": np.array(RATE, np.int64)}


def make_sound(rng: np.random.Generator, steps: int) -> list[np.ndarray]:
    """Bursts of a humming tone in noise, cut as the model takes it: [1, context + chunk] each."""
    time = np.arange(CONTEXT + steps * CHUNK) / RATE
    pitch = rng.uniform(90, 220)
    tone = sum(np.sin(2 * np.pi * pitch * harmonic * time) / harmonic for harmonic in range(1, 12))
    bursts = np.sin(2 * np.pi * rng.uniform(1, 3) * time + rng.uniform(0, 6)) > 0
    samples = (0.2 * tone * bursts + 0.01 * rng.standard_normal(time.size)).astype(np.float32)
    return [samples[None, step * CHUNK : step * CHUNK + CONTEXT + CHUNK] for step in range(steps)]


async def compare_all(address: str, sessions: Mapping[str, ort.InferenceSession], arguments: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    async with triton.InferenceServerClient(address) as client:
        for model, session in sessions.items():
            comparison = Comparison(client, address, model, session)
            if model == STATEFUL:
                task = comparison.compare_sequences(arguments.sequences, arguments.steps, arguments.seed)
            else:
                task = comparison.compare(arguments.alone, arguments.at_once, arguments.seed)
            verdicts.append(await _judged(model, task))
    return verdicts


async def compare_batches(address: str, sessions: Mapping[str, ort.InferenceSession], arguments: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    async with triton.InferenceServerClient(address) as client:
        for model, session in sessions.items():
            rng, make = np.random.default_rng(arguments.seed), maker_of(model, session)
            calls = [make(rng, number, 1) for number in range(arguments.at_once)]
            verdict = await _judged(model, Comparison(client, address, model, session).compare_at_once(calls))
            verdict.model = f"{model}, batches of {arguments.fixed_batch}"
            verdicts.append(verdict)
    return verdicts


async def _judged(model: str, comparison: Awaitable[Verdict]) -> Verdict:
    try:
        return await comparison
    except InferenceServerException as error:
        return Verdict(model, "-", "-", float("nan"), float("nan"), [f"call failed: {error}"])


def serve_and_compare(
    repository: Path,
    sessions: Mapping[str, ort.InferenceSession],
    compare: Callable[[str, Mapping[str, ort.InferenceSession], argparse.Namespace], Coroutine[None, None, list[Verdict]]],
    arguments: argparse.Namespace,
) -> list[Verdict]:
    """Raises ServerFailed when the server does not get ready."""
    log = repository.with_suffix(".log")
    server = headrace(arguments.transport).server(repository, next(iter(sessions)), cores=arguments.server_cores, log=log)
    with server:
        server.wait_ready(list(sessions), 60.0)
        return asyncio.run(compare(server.address, sessions, arguments))


def fixed_batch_toml(size: int) -> str:
    return f"max_batch_size = {size}\nallowed_batch_sizes = [{size}]\n"


def render(verdicts: Sequence[Verdict]) -> str:
    rows = [[v.model, v.alone, v.at_once, f"{v.off:.2g}", f"{v.rows_per_batch:.2f}", "; ".join(v.failures) or "same"] for v in verdicts]
    return markdown_table(["model", "alone", "at once", "largest difference", "rows/batch", "verdict"], rows)


def _parser() -> argparse.ArgumentParser:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.check_real_models", description=description, formatter_class=formatter)
    add_models_argument(parser)
    parser.add_argument("--transport", default=None, help="of the server (default: its own choice)")
    parser.add_argument("--server-cores", type=lambda text: [int(core) for core in text.split(",")], default=[0], metavar="N,N,..")
    parser.add_argument("--alone", type=int, default=16, help="calls one at a time; every fourth has four rows")
    parser.add_argument("--at-once", type=int, default=64, help="calls at once")
    parser.add_argument("--sequences", type=int, default=4, help="silero_vad: at the same time")
    parser.add_argument("--steps", type=int, default=100, help="silero_vad: length of a sequence")
    parser.add_argument("--fixed-batch", type=int, default=8, help="of the second server; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    exit_on_terminate()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = write_repository(scratch / "models", selected_models(parser, arguments))
        # As many threads as the server has cores: how work is cut among threads may show in the last bit.
        sessions = {model: open_session(path, len(arguments.server_cores)) for model, path in paths.items()}
        batchable = {model: paths[model] for model in paths if model != STATEFUL}
        try:
            verdicts = serve_and_compare(scratch / "models", sessions, compare_all, arguments)
            if arguments.fixed_batch and batchable:
                write_repository(scratch / "batched", batchable)
                for model in batchable:
                    (scratch / "batched" / model / "model.toml").write_text(fixed_batch_toml(arguments.fixed_batch))
                sessions = {model: sessions[model] for model in batchable}
                verdicts += serve_and_compare(scratch / "batched", sessions, compare_batches, arguments)
        except ServerFailed as error:
            print(error)
            return 1
    print(render(verdicts))
    return 1 if any(verdict.failures for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
