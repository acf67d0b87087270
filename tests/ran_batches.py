"""Batches that have run, as observers get them: rows of 4 numbers in, scores of 3 classes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from headrace.backends.base import ArtifactSignature
from headrace.batching.observer import RanBatch
from headrace.config import CaptureConfig, FeedbackConfig, ModelConfig
from headrace.lifecycle.effective import EffectiveModel, resolve
from headrace.requests import InputTensor, Reply, Ticket
from headrace.signature import DataType, TensorSpec
from headrace.testing import CollectingOutlet
from numpy.typing import NDArray

ARTIFACT = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, 4)),), (TensorSpec("scores", DataType.FP32, (-1, 3)),))


def model(**sections: CaptureConfig | FeedbackConfig) -> EffectiveModel:
    config = ModelConfig("m", **sections)  # type: ignore[arg-type]  # each by its own name
    return resolve(config, ARTIFACT, backend="fake", platform="fake", filename="model.fake", labels={})


def ran(scores: NDArray[Any], ids: Sequence[str], rows: Sequence[int] = ()) -> RanBatch:
    """A request for each id, of one row or as many as `rows` says."""
    rows = rows or [1] * len(ids)
    outlet = CollectingOutlet()
    tickets = []
    for id, count in zip(ids, rows, strict=True):
        tensor = InputTensor("x", "FP32", (count, 4), np.zeros((count, 4), np.float32).tobytes())
        tickets.append(Ticket(Reply(outlet), count, (), [tensor], (0,), id=id, arrived=time.monotonic()))
    total = sum(rows)
    return RanBatch(tickets, total, {"x": np.zeros((total, 4), np.float32)}, ["scores"], [scores.astype(np.float32)], time.monotonic())
