"""Everything that wants a GPU, in one go: built, checked, measured, and written down.

    python -m loadtests.gpu_report [--sections machine,kernels] [--device 0] [--json gpu.json] [--out gpu.html]

Each section is a module with a function `run(report) -> dict`, in a process of its own: one that fails, or that takes the context of the
GPU with it, is reported, and the rest goes on. The exit code is 0 when all sections ran and no check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests.gpu_device import KernelsUnavailable, find_device

SECTIONS = {
    "machine": "loadtests.gpu_machine",
    "kernels": "loadtests.gpu_kernels",
    "onnxruntime": "loadtests.gpu_onnxruntime",
    "tensorrt": "loadtests.gpu_tensorrt",
}
"""In the order of the report; `machine` measures what others are a fraction of."""
TIMEOUT = 3600.0
"""Seconds of one section."""

_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True, slots=True)
class Report:
    """What a section is given. `earlier`: results of the sections before it, by name, of those that succeeded."""

    device_id: int = 0
    seed: int = 1
    earlier: Mapping[str, Any] = field(default_factory=dict)


def run_section(name: str, module: str, report: Report, timeout: float = TIMEOUT) -> dict[str, Any]:
    """{"status": done, failed or not there, "seconds", "result" or "reason"}."""
    if find_spec(module) is None:
        return {"status": "not there", "seconds": 0.0, "reason": f"section not there: no module {module}"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headrace-gpu-") as directory:
        given, written = Path(directory, "report.json"), Path(directory, "result.json")
        given.write_text(json.dumps(asdict(report)))
        command = [sys.executable, "-m", "loadtests.gpu_section", module, str(given), str(written)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=_environment())
            reason = f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-4000:]}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:.0f} s"
        seconds = round(time.monotonic() - started, 1)
        if reason:
            return {"status": "failed", "seconds": seconds, "reason": reason}
        return {"status": "done", "seconds": seconds, "result": json.loads(written.read_text())}


def _environment() -> dict[str, str]:
    """As ours, with the places that this process found its own modules in."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def failed_checks(sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on what did not go well; a check that was not run (`passed` is None) is none of them."""
    found = [f"{name}: {section['reason']}" for name, section in sections.items() if section["status"] == "failed"]
    for name, section in sections.items():
        for check in section.get("result", {}).get("checks", ()):
            if check["passed"] is False:
                found.append(f"{name}: {check['what']}: got {check['got']}")
    return found


def as_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, section in sections.items():
        lines.append(f"== {name}: {section['status']} after {section['seconds']} s {section.get('reason', '')}".rstrip())
        result = section.get("result", {})
        lines += [f"{key}: {value}" for key, value in result.items() if key not in ("checks", "tables")]
        lines += [f"{_verdict(check['passed'])}  {check['what']}: {check['got']}" for check in result.get("checks", ())]
        for table in result.get("tables", ()):
            lines.append(table["title"])
            lines += [", ".join(f"{key} {value}" for key, value in row.items()) for row in table["rows"]]
    return "\n".join(lines)


def as_html(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """One file that asks the network for nothing."""
    parts = []
    for name, section in sections.items():
        parts.append(f"<h2>{escape(name)}</h2><p class=note>{section['status']} after {section['seconds']} s</p>")
        if "reason" in section:
            parts.append(f"<pre class=failure>{escape(section['reason'])}</pre>")
        result = section.get("result", {})
        for key, value in result.items():
            if key not in ("checks", "tables"):
                parts.append(_facts(value) if isinstance(value, Mapping) else f"<p>{escape(key)}: {escape(str(value))}</p>")
        if checks := result.get("checks"):
            parts.append(_table([{"": _verdict(one["passed"]), "check": one["what"], "got": one["got"]} for one in checks]))
        for table in result.get("tables", ()):
            parts.append(f"<h3>{escape(table['title'])}</h3>{_table(table['rows'])}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Headrace on a GPU</title><style>{_STYLE.read_text()}</style>"
        f"<h1>Headrace on a GPU</h1>{''.join(parts)}</html>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(str(key))}<dd>{escape(str(value))}" for key, value in facts.items()) + "</dl>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row.get(column, '')))}" for column in columns) for row in rows)
    return f"<div class=wide><table><thead><tr>{head}<tbody>{body}</table></div>"


def _verdict(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "not run"}[passed]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu_report", description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, of %(default)s")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 32), help="of random inputs; a new one each time by default")
    parser.add_argument("--json", type=Path, help="write all results")
    parser.add_argument("--out", type=Path, help="write a page")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    try:
        find_device(options.device)
    except KernelsUnavailable as error:
        print(f"gpu_report measures on a GPU, and none can be used: {error}", file=sys.stderr)
        return 1
    sections: dict[str, dict[str, Any]] = {}
    for name in names:
        earlier = {done: section["result"] for done, section in sections.items() if "result" in section}
        sections[name] = run_section(name, SECTIONS[name], Report(options.device, options.seed, earlier))
        print(as_text({name: sections[name]}), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"kind": "gpu", "seed": options.seed, "sections": sections}, indent=1))
    if options.out:
        options.out.write_text(as_html(sections))
    failures = failed_checks(sections)
    print("\n".join(["", f"{len(failures)} failures", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
