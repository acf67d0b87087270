"""One model with two sets of weights, and the exact answers of both, so that an answer shows which of them gave it.

Odd versions are published with the weights A, the model's own; even ones with B, the same graph with its weights disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from loadtests.calls import (
    TOLERANCE,
    Arrays,
    decode_answer,
    difference,
    infer_message,
    is_bitwise_equal,
    open_session,
    right_answer,
    sample_inputs,
)

INPUTS = 64
APART = 1000 * TOLERANCE
"""Between the two answers to one input: then none that is right for one version to the tolerance can pass for the other's."""
MOST_DRAWS = 16 * INPUTS
GROUP = 8
STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)


def disturb(model: onnx.ModelProto, strength: float, seed: int) -> int:
    """Multiply every float weight by noise around 1, in place; the number of tensors that changed.

    Weights are tensors of two dimensions and more. Vectors may be a Resize's scales, which are part of the graph.
    """
    rng = np.random.default_rng(seed)
    changed = 0
    for tensor in _constants(model.graph):
        if tensor.data_type in _FLOATS and len(tensor.dims) >= 2:
            values = numpy_helper.to_array(tensor)
            noise = 1.0 + strength * rng.standard_normal(values.shape)
            tensor.CopyFrom(numpy_helper.from_array((values * noise).astype(values.dtype), tensor.name))
            changed += 1
    return changed


def _constants(graph: onnx.GraphProto) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


class Verdict(StrEnum):
    EQUAL = "bitwise equal"
    CLOSE = "equal to the tolerance"
    OTHER = "the other version's answer"
    WRONG = "no version's answer"


@dataclass(frozen=True, slots=True)
class Answers:
    """A model with encoded calls and what each of its variants answers to them. One variant: every version gives the same."""

    model: str
    messages: Sequence[bytes]
    variants: Sequence[Sequence[Arrays]]

    def judge(self, version: int, number: int, message: bytes) -> Verdict:
        """Of `message`, the answer that `version` gave to call `number`."""
        got = decode_answer(message)
        right = variant_of(version, len(self.variants))
        if is_bitwise_equal(got, self.variants[right][number]):
            return Verdict.EQUAL
        if difference(got, self.variants[right][number]) <= TOLERANCE:
            return Verdict.CLOSE
        others = (answers for index, answers in enumerate(self.variants) if index != right)
        return Verdict.OTHER if any(difference(got, answers[number]) <= TOLERANCE for answers in others) else Verdict.WRONG


def variant_of(version: int, variants: int = 2) -> int:
    """The index of the weights that a version has: odd versions the first, even ones the second."""
    return (version - 1) % variants


def answers_of(model: str, path: Path, seed: int) -> Answers:
    """For a model that stays as it is."""
    session, rng = open_session(path), np.random.default_rng(seed)
    inputs = [sample_inputs(session, 1, rng) for _ in range(INPUTS)]
    return Answers(model, [infer_message(model, each) for each in inputs], [[right_answer(session, each) for each in inputs]])


def make_variants(model: str, path: Path, folder: Path, seed: int) -> tuple[Answers, list[Path]]:
    """The files of A and B in `folder`, named model.onnx as a server wants them, and their answers to inputs that tell them apart.

    Disturbs as little as is enough. Raises ValueError for a model of which no disturbance shows in its answers.
    """
    original = onnx.load(str(path))
    paths = [folder / name / "model.onnx" for name in ("a", "b")]
    for each in paths:
        each.parent.mkdir(parents=True, exist_ok=True)
    paths[0].write_bytes(original.SerializeToString())
    for strength in STRENGTHS:
        disturbed = onnx.ModelProto()
        disturbed.CopyFrom(original)
        if not disturb(disturbed, strength, seed):
            raise ValueError(f"{path}: expected float weights of two dimensions or more, found none to disturb")
        paths[1].write_bytes(disturbed.SerializeToString())
        inputs, variants = _telling_inputs(paths, seed)
        if len(inputs) == INPUTS:
            return Answers(model, [infer_message(model, each) for each in inputs], variants), paths
    raise ValueError(f"{path}: expected weights disturbed by {STRENGTHS[-1]:g} to change answers by {APART:g}, they do not")


def _telling_inputs(paths: Sequence[Path], seed: int) -> tuple[list[Arrays], list[list[Arrays]]]:
    """INPUTS random inputs to which the two models' answers are apart and steady; fewer where they are hard to find."""
    sessions, rng = [open_session(path) for path in paths], np.random.default_rng(seed)
    telling: list[tuple[Arrays, list[Arrays]]] = []
    waiting: list[tuple[Arrays, list[Arrays]]] = []
    for draws in range(1, MOST_DRAWS + 1):
        drawn = sample_inputs(sessions[0], 1, rng)
        answers = [right_answer(session, drawn) for session in sessions]
        if APART < difference(answers[1], answers[0]) < float("inf"):
            waiting.append((drawn, answers))
        if len(waiting) == GROUP:
            telling += [each for each, steady in zip(waiting, _are_steady(sessions, waiting), strict=True) if steady]
            waiting.clear()
        is_hopeless = draws >= 2 * INPUTS and len(telling) * MOST_DRAWS < INPUTS * draws
        if len(telling) >= INPUTS or is_hopeless:
            break
    del telling[INPUTS:]
    return [inputs for inputs, _ in telling], [[answers[index] for _, answers in telling] for index in range(len(paths))]


def _are_steady(sessions: Sequence[ort.InferenceSession], group: Sequence[tuple[Arrays, Sequence[Arrays]]]) -> list[bool]:
    """Whether each input has the same answer within batches as alone, well within the tolerance.

    Weights that were disturbed much can blow the last bits up, in which batches of different sizes differ.
    """
    steady = [True] * len(group)
    if any(not tensor.shape or isinstance(tensor.shape[0], int) for tensor in sessions[0].get_inputs()):
        return steady  # what takes no batches is never batched by a server either
    for index, session in enumerate(sessions):
        for size in (2, 4, 8):
            for start in range(0, len(group), size):
                part = group[start : start + size]
                batch = {name: np.concatenate([inputs[name] for inputs, _ in part]) for name in part[0][0]}
                answers = right_answer(session, batch)
                for row, (_, alone) in enumerate(part):
                    cut = {name: value[row : row + 1] for name, value in answers.items()}
                    steady[start + row] &= difference(cut, alone[index]) <= TOLERANCE / 4
    return steady
