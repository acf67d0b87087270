"""Every kernel once against its definition, launched and through a graph: small enough for compute-sanitizer.

compute-sanitizer python -m loadtests.gpu_check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loadtests.gpu_device import GpuMachine, KernelsUnavailable
from loadtests.gpu_kernels import check


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu_check", description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    bad = 0
    for through_graph in (False, True):
        try:
            machine = GpuMachine(options.device, through_graph)
        except KernelsUnavailable as error:
            print(f"no GPU to check the kernels on: {error}", file=sys.stderr)
            return 1
        right, wrong = check(options.seed, machine)
        machine.close()
        print(f"{'through a graph' if through_graph else 'launched'}: {right} right, {len(wrong)} wrong")
        for name, reason in wrong.items():
            print(f"{name}: {reason}")
        bad += len(wrong)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
