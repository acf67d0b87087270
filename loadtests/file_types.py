"""A file-type model whose traffic changes its mix: rows for a reference, and requests, made of this machine's own files.

    python -m loadtests.file_types save usual.npz --mix usual --rows 2000
    headrace drift profile --model models/magika --data usual.npz
    python -m loadtests.file_types send --mix usual --rows 2000      # to a server that runs; then --mix other
    headrace drift report magika

For models with magika's input: int32 [N, 2048], a file's first 1,024 bytes and its last, without the blanks around, 256 for none.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tritonclient.grpc as client
from numpy.typing import NDArray

Rows = NDArray[np.int32]

SIDE, BLOCK, NOTHING = 1024, 4096, 256
MIXES: Mapping[str, Mapping[str, float]] = {
    "usual": {".py": 0.5, ".h": 0.1, ".html": 0.1, ".js": 0.1, ".json": 0.1, ".md": 0.1},
    "shifted": {".py": 0.35, ".h": 0.1, ".html": 0.1, ".js": 0.15, ".json": 0.2, ".md": 0.1},
    "other": {".py": 0.2, ".html": 0.1, ".so": 0.3, ".png": 0.2, ".gz": 0.2},
}
MOST_FILES = 4000
"""Of a type; they are repeated where more rows are asked for."""


def encode(path: Path) -> Rows:
    """As Magika's own client does it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(BLOCK).lstrip()[:SIDE]
        file.seek(max(size - BLOCK, 0))
        last = file.read(BLOCK).rstrip()[-SIDE:]
    row = np.full(2 * SIDE, NOTHING, np.int32)
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * SIDE - len(last) :] = np.frombuffer(last, np.uint8)
    return row


def gather(roots: list[Path], suffixes: set[str], seed: int) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {suffix: [] for suffix in suffixes}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if path.suffix in found and not path.is_symlink() and path.stat().st_size >= 64:
                    found[path.suffix].append(path)
    for suffix, paths in found.items():
        if not paths:
            sys.exit(f"no {suffix} file of 64 bytes or more below {', '.join(map(str, roots))}")
        random.Random(seed).shuffle(paths)
    return {suffix: paths[:MOST_FILES] for suffix, paths in found.items()}


def rows_of(mix: Mapping[str, float], files: Mapping[str, list[Path]], count: int, seed: int) -> Iterator[Rows]:
    chance = random.Random(seed)
    for suffix in chance.choices(list(mix), list(mix.values()), k=count):
        yield encode(chance.choice(files[suffix]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("save", "send"))
    parser.add_argument("file", nargs="?", help="where `save` writes the rows, .npz")
    parser.add_argument("--mix", choices=MIXES, default="usual")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--files", type=Path, nargs="+", default=[Path(sys.prefix), Path("/usr")], help="where to look for files")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", default="magika")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if (options.command == "save") != bool(options.file):
        parser.error("expected a FILE with save, and none with send")
    mix = MIXES[options.mix]
    rows = rows_of(mix, gather(options.files, set(mix), seed=0), options.rows, options.seed)
    if options.command == "save":
        np.savez_compressed(options.file, bytes=np.stack(list(rows)))
        return
    began = time.monotonic()
    with client.InferenceServerClient(options.url) as stub:
        for row in rows:
            tensor = client.InferInput("bytes", [1, len(row)], "INT32")
            tensor.set_data_from_numpy(row[None])
            stub.infer(options.model, [tensor])
    print(f"{options.rows:,} rows of the {options.mix} mix in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
