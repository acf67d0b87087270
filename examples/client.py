"""Calls the example models with the stock tritonclient: `python examples/client.py [--url HOST:PORT]`, beside `make run`."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import tritonclient.grpc as triton
from sklearn.datasets import load_diabetes, load_digits
from tritonclient.utils import InferenceServerException


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def show_digits(client: triton.InferenceServerClient) -> None:
    images, labels = (held_out[-297:] for held_out in load_digits(return_X_y=True))
    images = images.astype(np.float32)
    print("digits, one request each:")
    for image, label in zip(images[:10], labels[:10], strict=True):
        start = time.perf_counter()
        result = client.infer("digits", [tensor("image", image[None], "FP32")])
        took = (time.perf_counter() - start) * 1e3
        seen, confidence = result.as_numpy("label")[0], result.as_numpy("probabilities").max()
        print(f"  true {label}   predicted {seen}   confidence {confidence:.2f}   {took:.2f} ms   {'' if seen == label else '<- wrong'}")
    predicted = [client.infer("digits", [tensor("image", images[i : i + 33], "FP32")]).as_numpy("label") for i in range(0, 297, 33)]
    print(f"  {np.mean(np.concatenate(predicted) == labels):.1%} of the 297 held-out images are right (requests of 33 rows)")


def show_diabetes(client: triton.InferenceServerClient) -> None:
    features, target = (held_out[-100:] for held_out in load_diabetes(return_X_y=True, scaled=False))
    sex = np.where(features[:, 1:2] == 1, b"female", b"male").astype(object)
    measurements = np.delete(features, 1, axis=1).astype(np.float32)
    result = client.infer("diabetes", [tensor("sex", sex[:64], "BYTES"), tensor("measurements", measurements[:64], "FP32")])
    predicted = result.as_numpy("progression")[:, 0]
    print("diabetes, strings and numbers in one request of 64 rows:")
    for i in range(3):
        who = f"{sex[i, 0].decode():6} aged {measurements[i, 0]:.0f}, bmi {measurements[i, 1]:.1f}"
        print(f"  {who}: predicted {predicted[i]:.0f}, true {target[i]:.0f}")
    print(
        f"  mean absolute error {np.abs(predicted - target[:64]).mean():.0f} (always the mean: {np.abs(target - target.mean()).mean():.0f})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001")
    url = parser.parse_args().url
    with triton.InferenceServerClient(url) as client:
        try:
            if not client.is_server_ready():
                print(f"the server at {url} is up but not ready; its log says why", file=sys.stderr)
                return 1
            show_digits(client)
            show_diabetes(client)
        except InferenceServerException as error:
            print(f"no answer from {url}: {error.message()}; is `make run` running?", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
