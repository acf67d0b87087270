"""Has pictures classified by the example model digits_image: `python examples/classify_image.py [FILE ...] [--url HOST:PORT]`.

Each goes as it is, in bytes; the server resizes it. Files (of a light digit on a dark ground) need Pillow; without any, some of the
held-out digits are sent, drawn larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL = "digits_image"


def held_out() -> Iterator[tuple[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, (height, width) in enumerate([(8, 8), (16, 24), (40, 40), (120, 80), (480, 640)], start=-297):
        small = (images[number].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        yield f"a {labels[number]}, {height} x {width}", np.kron(small, np.ones((height // 8, width // 8), np.uint8))


def read(files: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            yield file, np.asarray(image.convert("L"))


def classify(client: triton.InferenceServerClient, image: np.ndarray) -> list[tuple[str, float]]:
    """(digit, probability), the most probable first."""
    batch = image[None, :, :, None]
    tensor = triton.InferInput("image", batch.shape, "UINT8")
    tensor.set_data_from_numpy(batch)
    result = client.infer(MODEL, [tensor])
    return [(str(digit), float(p)) for digit, p in zip(result.as_numpy("scores_classes")[0], result.as_numpy("scores")[0], strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--url", default="127.0.0.1:8001")
    options = parser.parse_args()
    with triton.InferenceServerClient(options.url) as client:
        try:
            for name, image in read(options.files) if options.files else held_out():
                answer = ", ".join(f"{digit} ({p:.1%})" for digit, p in classify(client, image))
                print(f"{name} ({image.nbytes:,} bytes): {answer}")
        except InferenceServerException as error:
            print(f"no answer from {options.url}: {error.message()}; is `make run` running?", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
