"""Compile the kernels ahead of time: `python -m headrace_kernels.build`. Without it they are compiled at first use, by NVRTC."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.sources import DIRECTORY, digest

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""A100, its smaller sisters, Ada, Hopper, Blackwell and its smaller sisters. Of the last there is PTX too, for what comes after."""
FLAGS = ("-std=c++17", "-O3", "--threads=1")

_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'")
_SPILLS = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says of one kernel on one architecture. Bytes; `shared`: the static part."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


def fatbin_path(directory: Path | None = None) -> Path:
    """Where the fatbin of these sources is looked for; None: in the package."""
    return (directory or DIRECTORY) / f"kernels-{digest()}.fatbin"


def find_nvcc() -> Path:
    """Raises KernelsUnavailable where there is none."""
    candidates = [shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(shutil.which("nvcc", path=f"{home}/bin"))
    candidates.append(shutil.which("nvcc", path="/usr/local/cuda/bin"))
    for candidate in candidates:
        if candidate:
            return Path(candidate)
    raise KernelsUnavailable("nvcc was not found on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin: install the CUDA toolkit")


def parse_resources(log: str) -> list[Resources]:
    """Out of what `ptxas -v` prints for one architecture."""
    found = []
    for block in re.split(r"(?=Compiling entry function)", log):
        entry, used, spills, shared = _ENTRY.search(block), _USED.search(block), _SPILLS.search(block), _SHARED.search(block)
        if entry and used and spills:
            found.append(
                Resources(
                    entry["kernel"],
                    entry["architecture"],
                    int(used["registers"]),
                    int(spills["stack"]),
                    int(spills["stores"]) + int(spills["loads"]),
                    int(shared["shared"]) if shared else 0,
                )
            )
    return found


def compile_cubin(nvcc: Path, architecture: int, into: Path, source: Path = DIRECTORY / "kernels.cu") -> list[Resources]:
    """One architecture's machine code. Raises KernelsUnavailable with the compiler's reasons."""
    log = _run([nvcc, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", *FLAGS, "-o", into, source])
    return parse_resources(log)


def build(out: Path, architectures: Sequence[int] = ARCHITECTURES) -> list[Resources]:
    """One fatbin at `out`, in place of what is there only when it is whole; as many compilers at once as there are cores."""
    nvcc = find_nvcc()
    newest = max(architectures)
    with tempfile.TemporaryDirectory(prefix="headrace-kernels-") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(name)
        ptx = pool.submit(_run, [nvcc, "-ptx", f"-arch=compute_{newest}", *FLAGS, "-o", work / "ptx", DIRECTORY / "kernels.cu"])
        cubins = {architecture: pool.submit(compile_cubin, nvcc, architecture, work / str(architecture)) for architecture in architectures}
        resources = [one for cubin in cubins.values() for one in cubin.result()]
        ptx.result()
        images = [f"--image3=kind=elf,sm={architecture},file={work / str(architecture)}" for architecture in architectures]
        images.append(f"--image3=kind=ptx,sm={newest},file={work / 'ptx'}")
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".new")
        _run([_tool(nvcc, "fatbinary"), "-64", f"--create={unfinished}", *images])
        unfinished.replace(out)
    return resources


def _tool(nvcc: Path, name: str) -> Path:
    """Beside nvcc itself: what is on PATH may be a script that calls it."""
    match = re.search(r"^#\$ _HERE_=(.+)$", _run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    return Path(match[1]) / name if match else nvcc.with_name(name)


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise KernelsUnavailable(f"{Path(command[0]).name} failed ({done.returncode}): {done.stdout.strip()[-4000:]}")
    return done.stdout


def table(resources: Sequence[Resources]) -> str:
    """A line a kernel and architecture, the greedy ones last."""
    lines = [f"{'kernel':<36} {'arch':<8} {'registers':>9} {'stack':>6} {'spills':>6} {'shared':>7}"]
    for one in sorted(resources, key=lambda one: (one.spills, one.registers, one.kernel, one.architecture)):
        lines.append(f"{one.kernel:<36} {one.architecture:<8} {one.registers:>9} {one.stack:>6} {one.spills:>6} {one.shared:>7}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace_kernels.build", description=__doc__)
    parser.add_argument("--out", type=Path, help="directory of the fatbin; the package's own by default, where it is found at run time")
    parser.add_argument("--ptxas-info", action="store_true", help="print what each kernel uses; exit 1 if one spills registers")
    options = parser.parse_args(arguments)
    try:
        resources = build(out := fatbin_path(options.out))
    except KernelsUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out} ({out.stat().st_size:,} B, {len(resources)} kernels)")
    if not options.ptxas_info:
        return 0
    print(table(resources))
    spilling = [one for one in resources if one.spills]
    print(f"{len(spilling)} of {len(resources)} kernels spill registers")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
