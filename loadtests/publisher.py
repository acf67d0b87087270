"""Somebody who publishes versions of a model while it is served. A process of its own, driven by lines.

    python -m loadtests.publisher REPOSITORY STAGING MODEL A.onnx B.onnx --first 2 --count 60 [--every 1.0]

With --every it stages all versions with `headrace publish`'s own function, says `staged`, waits for a line, and then renames one
version into the repository every so many seconds. Without, it stages and renames one for each line it is given. Each is said as
`published NUMBER TIME`, where TIME is the system's monotonic clock just before the rename: nobody can have seen it earlier.
Version directories other than the newest few are deleted, as a registry's retention does it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.base import BackendRegistry
from headrace.config import SourceConfig
from headrace.plugins import load_backends, open_destination
from headrace.sources.base import is_version_name
from headrace.sources.publish import Order, publish

from loadtests.variants import variant_of

KEPT = 4


@dataclass(frozen=True, slots=True)
class Publisher:
    """`staging` is a repository too, on the same file system, that nobody serves. `artifacts`: the weights A and B."""

    repository: Path
    staging: Path
    model: str
    artifacts: Sequence[Path]
    backends: BackendRegistry

    def stage(self, version: int, signing_key: Path | None = None) -> Path:
        """A complete version, with its manifest, where the server does not look."""
        artifact = self.artifacts[variant_of(version, len(self.artifacts))]
        order = Order(artifact, self.model, version, signing_key=signing_key)
        publish(order, open_destination(str(self.staging), SourceConfig()), self.backends)
        return self.staging / self.model / str(version)

    def commit(self, version: int) -> float:
        """Rename what was staged to where it is served from; when, by the monotonic clock."""
        target = self.repository / self.model / str(version)
        target.parent.mkdir(parents=True, exist_ok=True)
        now = time.monotonic()
        (self.staging / self.model / str(version)).rename(target)
        return now

    def retire(self, newest: int, kept: int = KEPT) -> None:
        """Delete all but the `kept` versions up to `newest`."""
        for directory in (self.repository / self.model).iterdir():
            if is_version_name(directory.name) and int(directory.name) <= newest - kept:
                shutil.rmtree(directory)


def publish_timed(publisher: Publisher, versions: Sequence[int], every: float) -> None:
    for version in versions:
        publisher.stage(version)
    print("staged", flush=True)
    if not sys.stdin.readline():
        return  # whoever started us is gone
    due = time.monotonic()
    for version in versions:
        time.sleep(max(0.0, due - time.monotonic()))
        print(f"published {version} {publisher.commit(version)!r}", flush=True)
        publisher.retire(version)
        due += every


def publish_on_demand(publisher: Publisher, versions: Sequence[int]) -> None:
    print("staged", flush=True)
    for version in versions:
        if not sys.stdin.readline():
            return
        publisher.stage(version)
        print(f"published {version} {publisher.commit(version)!r}", flush=True)
        publisher.retire(version)


def main() -> int:
    parser = argparse.ArgumentParser(prog="loadtests.publisher", description="Publish versions of a model, one after another.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("staging", type=Path)
    parser.add_argument("model")
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--every", type=float, default=None, help="seconds; left out: one for each line on standard input")
    options = parser.parse_args()
    publisher = Publisher(options.repository, options.staging, options.model, options.artifacts, load_backends())
    versions = range(options.first, options.first + options.count)
    if options.every is None:
        publish_on_demand(publisher, versions)
    else:
        publish_timed(publisher, versions, options.every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
