"""Handwritten digits, sent to a server one request after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as client
from sklearn.datasets import load_digits

IMAGES = load_digits().data.astype(np.float32)
LABELS = load_digits().target


def ask(address: str, rows: Sequence[int]) -> list[Any]:
    """A request for each number of rows, the next rows of the digits."""
    answers, start = [], 0
    with client.InferenceServerClient(address) as stub:
        for number, count in enumerate(rows):
            tensor = client.InferInput("image", [count, 64], "FP32")
            tensor.set_data_from_numpy(IMAGES[start : start + count])
            answers.append(stub.infer("digits", [tensor], request_id=f"r{number}"))
            start += count
    return answers
