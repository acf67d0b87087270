"""Write the lock files of the images: `python scripts/lock_images.py [--upgrade]`; needs uv and the package index.

One file for each image and Python version, every package with the hashes of its files, so that an image is made from the same bytes
whenever it is built. Versions that a file has stay until `--upgrade`, or until pyproject.toml no longer allows them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "docker"

PYTHON = "3.13"
"""Debian 13's, which both images use."""
PLATFORM = "x86_64-manylinux_2_40"
"""Debian 13 has glibc 2.41. Other architectures take the same versions where they have wheels of them; see deploy/docker/README.md."""

COMMON = ("native", "object-store", "otel", "sign")
"""What a server in a container is likely to need: models from object stores, spans, signatures. Not `mlflow` and not `parquet`."""
EXTRAS = {"cpu": ("cpu", *COMMON), "gpu": ("gpu", *COMMON)}

BESIDE = {
    # The kernels' launcher and NVML, which the server loads where they are.
    "gpu": ("cuda-core>=1.2", "cuda-bindings>=13,<14", "nvidia-ml-py>=13.580"),
}
TOOLS = {
    # What builds headrace's own wheel: `build-system.requires` of pyproject.toml.
    "build": ("hatchling>=1.24",),
    # nvcc with what it needs to compile the kernels, a tenth of the image nvidia/cuda:*-devel. Of one minor release: the compiler, its
    # headers and its back end come in packages that do not ask for each other's versions.
    "nvcc": ("nvidia-cuda-nvcc==13.5.*", "nvidia-cuda-crt==13.5.*", "nvidia-nvvm==13.5.*", "nvidia-cuda-runtime==13.5.*"),
}


def lock_file(name: str) -> Path:
    return FOLDER / f"requirements-{name}-py{PYTHON.replace('.', '')}.txt"


def write(name: str, *, is_upgrade: bool) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("lock_images: expected the command uv (pip install uv), found none")
    with tempfile.TemporaryDirectory() as folder:
        more = Path(folder) / "requirements.in"
        more.write_text("\n".join(TOOLS.get(name, BESIDE.get(name, ()))) + "\n", encoding="utf-8")
        sources = [str(more)]
        if name in EXTRAS:
            sources += ["pyproject.toml", *(f"--extra={extra}" for extra in EXTRAS[name])]
        command = [uv, "pip", "compile", *sources, "--generate-hashes", "--only-binary=:all:", "--no-annotate", "--quiet"]
        command += [f"--python-version={PYTHON}", f"--python-platform={PLATFORM}"]
        command += ["--custom-compile-command=python scripts/lock_images.py", f"--output-file={lock_file(name)}"]
        subprocess.run([*command, *(["--upgrade"] if is_upgrade else [])], check=True, cwd=ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="the newest that pyproject.toml allows")
    parser.add_argument("names", nargs="*", default=[*EXTRAS, *TOOLS], help=f"of {', '.join([*EXTRAS, *TOOLS])}; left out: all")
    options = parser.parse_args()
    for name in options.names:
        write(name, is_upgrade=options.upgrade)
        print(lock_file(name).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
