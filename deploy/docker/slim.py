"""Remove from a virtual environment what a running server never loads: `python3 slim.py /opt/venv [--gpu]`. Standard library only.

Each pattern is relative to site-packages and has its reason; one that matches nothing is an error, so that a new release which moved
its files is seen in the build and not in the image's size.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ALWAYS = (
    ("pip", "installs nothing more: the image is finished"),
    ("pip-*.dist-info", "belongs to pip"),
    ("**/tests", "tests of packages, most of them numpy's"),
    ("**/*.pyx", "sources of what is compiled"),
    ("**/*.pxd", "sources of what is compiled"),
    ("numpy/f2py", "wraps Fortran"),
    ("numpy/_core/include", "headers"),
    ("numpy/_core/lib", "static libraries for extensions of numpy"),
    ("onnxruntime/capi/libonnxruntime.so.*", "the C API for other programs; the Python module has all of it in itself"),
    ("onnxruntime/transformers", "tools that rewrite models"),
    ("onnxruntime/quantization", "tools that rewrite models"),
    ("onnxruntime/tools", "tools that rewrite models"),
    ("onnxruntime/datasets", "example models"),
)
GPU = (
    ("nvidia/*/include", "headers"),
    ("nvidia/cu13/lib/libcufftw.so.*", "cuFFT for programs written for FFTW"),
)
"""cuDNN's parts all stay: libcudnn and libcudnn_graph load them by name as operators need them, and its documentation knows no
smaller set that keeps its compiled kernels. NVRTC and nvJitLink stay too: ONNX Runtime, cuBLASLt, cuFFT and cuDNN load them by name."""


DEBUGGED = ("uvloop", "aiohttp", "msgpack", "multidict", "yarl", "frozenlist", "propcache")
"""Packages whose extension modules are published with what a debugger wants: uvloop's alone is 16 MB with it and 2 without. Others are as
they came: those that were changed after linking, as numpy's are, do not all survive `strip`."""


def strip(site_packages: Path, package: str) -> int:
    """Bytes freed."""
    libraries = [path for path in (site_packages / package).rglob("*.so") if path.is_file()]
    before = sum(path.stat().st_size for path in libraries)
    if libraries:
        subprocess.run(["strip", "--strip-debug", *libraries], check=True)
    return before - sum(path.stat().st_size for path in libraries)


def remove(site_packages: Path, pattern: str) -> int:
    """Bytes freed."""
    found = [path for path in site_packages.glob(pattern) if path.exists()]
    freed = 0
    for path in found:
        freed += size(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # gone already with a folder above that matched too
    if not found:
        raise SystemExit(f"slim: expected something at {site_packages / pattern}, found nothing; has a package moved its files?")
    return freed


def size(path: Path) -> int:
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if each.is_symlink() or each.is_file())


def main() -> None:
    (site_packages,) = Path(sys.argv[1]).glob("lib/python3.*/site-packages")
    for pattern, reason in (*ALWAYS, *(GPU if "--gpu" in sys.argv else ())):
        print(f"{remove(site_packages, pattern) / 1e6:8.1f} MB  {pattern}: {reason}")
    for package in DEBUGGED:
        print(f"{strip(site_packages, package) / 1e6:8.1f} MB  {package}: what is for debuggers")
    for script in ("pip", "pip3"):
        (Path(sys.argv[1]) / "bin" / script).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
