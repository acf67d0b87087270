"""One section of gpu_report in a process of its own: MODULE REPORT.json RESULT.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from loadtests.gpu_report import Report


def main(arguments: Sequence[str]) -> int:
    module, given, written = arguments
    result = import_module(module).run(Report(**json.loads(Path(given).read_text())))
    Path(written).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
