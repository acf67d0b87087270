"""Remove from a virtual environment what a running server never loads: `python3 slim.py /opt/venv`. Standard library only.

Each pattern is relative to site-packages and has its reason; one that matches nothing is an error, so that a new release which moved
its files is seen in the build and not in the image's size.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ALWAYS = (
    ("pip", "installs nothing more: the image is finished"),
    ("pip-*.dist-info", "belongs to pip"),
    ("**/tests", "tests of packages, most of them numpy's"),
    ("numpy/f2py", "wraps Fortran"),
    ("numpy/_core/include", "headers"),
    ("numpy/_core/lib", "static libraries for extensions of numpy"),
    ("grpc/_cython/**/*.pyx", "sources of what is compiled"),
    ("uvloop/**/*.pyx", "sources of what is compiled"),
    ("onnxruntime/transformers", "tools that rewrite models"),
    ("onnxruntime/quantization", "tools that rewrite models"),
    ("onnxruntime/tools", "tools that rewrite models"),
    ("onnxruntime/datasets", "example models"),
)


def remove(site_packages: Path, pattern: str) -> int:
    """Bytes freed."""
    found = [path for path in site_packages.glob(pattern) if path.exists()]
    freed = 0
    for path in found:
        freed += size(path)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if not found:
        raise SystemExit(f"slim: expected something at {site_packages / pattern}, found nothing; has a package moved its files?")
    return freed


def size(path: Path) -> int:
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if each.is_symlink() or each.is_file())


def main() -> None:
    (site_packages,) = Path(sys.argv[1]).glob("lib/python3.*/site-packages")
    for pattern, reason in ALWAYS:
        print(f"{remove(site_packages, pattern) / 1e6:8.1f} MB  {pattern}: {reason}")
    for script in ("pip", "pip3"):
        (Path(sys.argv[1]) / "bin" / script).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
