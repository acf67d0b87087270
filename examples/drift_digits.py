"""Drift, seen with the digits of examples/models: `python examples/drift_digits.py clean --seconds 60`, then `... rotated --seconds 20`.

Sends random digits of scikit-learn's to a server that runs (`make run`): as they are, or rotated, mirrored, noisy, or with the wrong
scale (0 to 1 instead of 0 to 16). What the server makes of it: `headrace drift report digits`.

`--save FILE.npz` writes the digits and their classes instead: the data that the reference of the model is made of, by
`headrace drift profile --model examples/models/digits --data FILE.npz --label digit`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import tritonclient.grpc as client
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Images = NDArray[np.float32]

KINDS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "clean": lambda images, random: images,
    "rotated": lambda images, random: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images, random: images[:, :, ::-1],
    "noisy": lambda images, random: np.clip(images + random.normal(0, 3, images.shape), 0, 16).astype(np.float32),
    "rescaled": lambda images, random: images / 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS, default="clean")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--rows", type=int, default=8, help="digits of a request")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--save", metavar="FILE.npz")
    options = parser.parse_args()
    digits = load_digits()
    if options.save:
        np.savez_compressed(options.save, image=digits.data.astype(np.float32), digit=digits.target)
        return
    random = np.random.default_rng(options.seed)
    images = KINDS[options.kind](digits.images.astype(np.float32), random)
    sent, right = send(options, np.ascontiguousarray(images.reshape(-1, 64)), digits.target, random)
    print(f"{sent:,} {options.kind} digits sent, {right / max(sent, 1):.1%} of them recognised")


def send(options: argparse.Namespace, images: Images, truth: NDArray[np.int64], random: np.random.Generator) -> tuple[int, int]:
    """(digits sent, those that the model got right)"""
    sent = right = requests = 0
    began = time.monotonic()
    with client.InferenceServerClient(options.url) as stub:
        while time.monotonic() - began < options.seconds:
            chosen = random.integers(0, len(images), options.rows)
            tensor = client.InferInput("image", [options.rows, 64], "FP32")
            tensor.set_data_from_numpy(images[chosen])
            answer = stub.infer("digits", [tensor]).as_numpy("label")
            sent, right, requests = sent + options.rows, right + int((answer == truth[chosen]).sum()), requests + 1
            time.sleep(max(began + requests / options.rate - time.monotonic(), 0.0))
    return sent, right


if __name__ == "__main__":
    main()
