"""What pip makes of our dependency ranges: `python scripts/check_install.py [--lowest]`.

Installs headrace[cpu] beside a stock tritonclient into a fresh environment, as a wheel, and has the one call the other in one process.
Their ranges of protobuf meet, but narrowly: a bound of ours in the wrong place makes pip fall back on a client of years ago
without a word. `--lowest` runs the tests with the lowest release of each dependency that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = "tritonclient[grpc]"
OLDEST_CLIENT = (2, 60)
"""A client chosen on purpose is newer. The last without bounds of its own, which pip falls back on, is 2.41."""

PROGRAM = """
import asyncio, sys
import numpy as np
import tritonclient.grpc.aio as triton
from headrace.testing import serve_in_process

async def main():
    async with serve_in_process(sys.argv[1]) as server, triton.InferenceServerClient(server.grpc_addresses[0]) as client:
        image = triton.InferInput("image", [2, 64], "FP32")
        image.set_data_from_numpy(np.zeros((2, 64), np.float32))
        result = await client.infer("digits", [image])
        assert result.as_numpy("probabilities").shape == (2, 10)

asyncio.run(main())
"""

SHOW_VERSION = "from importlib.metadata import version; print(version('tritonclient'))"


def make_environment(folder: Path) -> Path:
    """Its python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """Standard output. Ends the program when the command fails, whose own words stand on standard error."""
    # Not the repository's packages: only what was installed may be found.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed with status {done.returncode}: {' '.join(map(str, arguments[:6]))}\n{done.stdout}")
    return done.stdout.strip()


def check_newest(folder: Path) -> None:
    python = make_environment(folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", f"{ROOT}[cpu]", CLIENT, cwd=folder)
    chosen = run(python, "-c", SHOW_VERSION, cwd=folder)
    if tuple(map(int, chosen.split(".")[:2])) < OLDEST_CLIENT:
        raise SystemExit(f"{CLIENT}: expected {'.'.join(map(str, OLDEST_CLIENT))} or newer beside headrace, pip chose {chosen}")
    run(python, "-c", PROGRAM, ROOT / "examples" / "models", cwd=folder)
    print(f"headrace[cpu] and tritonclient {chosen} install together and work in one process")


def check_lowest(folder: Path) -> None:
    python = make_environment(folder / "venv")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(lowest_releases()), encoding="utf-8")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "--editable", f"{ROOT}[cpu,dev]", cwd=folder)
    print(run(python, "-m", "pytest", cwd=ROOT).rpartition("\n")[2])


def lowest_releases() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [found.expand(r"\1==\2") for found in (re.match(r"([\w-]+)>=([\w.]+)", each) for each in requirements) if found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowest", action="store_true")
    check = check_lowest if parser.parse_args().lowest else check_newest
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
