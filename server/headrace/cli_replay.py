"""`headrace replay`: what clients have really asked, asked of another version, and how its answers differ."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli_local import LocalModel, add_repository, exit_code, open_model
from headrace.cli_models import Output, add_client_flags
from headrace.config import ModelConfig, check_listener
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from headrace.capture.reading import Contents
    from headrace.capture.records import Captured
    from headrace.replay.comparison import Limits, ReplayReport
    from headrace.replay.targets import Target

DONE, FAILED = 0, 1
WARM_UPS = 20
DESCRIPTION = """
Ask captured requests of another version and compare its answers with those that were captured: of a model on this machine, run here without
a server, or of one that is served (--url). Exit code 1 where an answer failed, could not be compared, or is beyond
the limits that are given.
"""


def add_replay(commands: Any) -> None:
    """Give the parsers of the whole command, which argparse has no public type for, that of `headrace replay`."""
    doc = "ask captured requests of another version, and compare its answers"
    replay: argparse.ArgumentParser = commands.add_parser("replay", help=doc, description=DESCRIPTION, parents=[add_client_flags(url="")])
    replay.add_argument("capture", type=Path, metavar="CAPTURE", help="the directory of `serve --capture`, or one of its files")
    replay.add_argument(
        "--model", default="", metavar="MODEL", help="directory of a model or a version, or a model file; with --url a name"
    )
    add_repository(replay)
    replay.add_argument("--version", default="", metavar="N", help="with --url: the version or label that is asked")
    replay.add_argument("--captured", default="", metavar="NAME[:N]", help="which requests; left out: those for a model of that name")
    replay.add_argument("--limit", type=_count, metavar="N", help="the first so many only")
    replay.add_argument("--rtol", type=_rate, metavar="R", help="relative tolerance of floats (1e-3); given, rows beyond it fail")
    replay.add_argument("--atol", type=_rate, metavar="A", help="absolute tolerance (1e-5), which is added; likewise")
    replay.add_argument("--max-outside", type=_rate, metavar="RATE", help="part of the rows that may be beyond the tolerance")
    replay.add_argument("--max-flips", type=_rate, metavar="RATE", help="part of the rows that may name another class")
    replay.add_argument("--warm-up", type=Path, metavar="DIR", help="write captured requests there as a version's warmup/ instead")
    replay.set_defaults(run=run)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from headrace.capture.reading import list_contents

    if bool(options.model) == bool(options.warm_up):
        raise ConfigError("expected --model with what is to be asked, or --warm-up with where to write requests")
    if options.url and options.models:
        raise ConfigError("--url and --models: expected one of them")
    if options.url:
        check_listener("--url", options.url)

    def work() -> int:
        contents = list_contents(options.capture)
        for cut in contents.cuts:
            print(f"headrace: {cut}; what is before it is read", file=sys.stderr)
        return _write_warm_up(options, contents) if options.warm_up else _replay(options, contents)

    return exit_code(work)


# -- which requests ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """The requests of one captured model, of all its versions where `version` is 0."""

    path: Path
    model: str
    version: int
    count: int

    def read(self) -> Iterator[Captured]:
        from headrace.capture.reading import read_capture

        left = self.count
        for captured in read_capture(self.path):
            if left and captured.model == self.model and self.version in (0, captured.version):
                left -= 1
                yield captured


def choose(contents: Contents, path: Path, asked: str, name: str, limit: int | None) -> Chosen:
    """`asked`: NAME[:N] or empty; then the model `name`, or the only one there is. Raises ConfigError."""
    there = ", ".join(f"{model}:{version} ({count})" for (model, version), count in sorted(contents.requests.items())) or "none"
    model, _, number = asked.rpartition(":") if ":" in asked else (asked, "", "")
    if number and not number.isdecimal():
        raise ConfigError(f"--captured: expected NAME or NAME:VERSION, got {asked!r}")
    if not model:
        model = name if name in contents.models or len(contents.models) != 1 else contents.models[0]
    version = int(number or 0)
    count = sum(count for (each, of), count in contents.requests.items() if each == model and version in (0, of))
    if not count:
        raise ConfigError(f"--captured: {path} has no requests for {asked or model or 'one model alone'}; it has requests for: {there}")
    return Chosen(path, model, version, min(count, limit or count))


# -- asking ------------------------------------------------------------------------------------------------------------


def _replay(options: argparse.Namespace, contents: Contents) -> int:
    from headrace.replay.comparison import Limits, Tolerance, exceeded, to_table
    from headrace.replay.targets import replay

    is_tolerance_given = options.rtol is not None or options.atol is not None
    outside = options.max_outside if options.max_outside is not None else (0.0 if is_tolerance_given else None)
    limits = Limits(options.max_flips, outside)
    usual = Tolerance()
    tolerance = Tolerance(usual.rtol if options.rtol is None else options.rtol, usual.atol if options.atol is None else options.atol)
    name, opened = _remote(options) if options.url else _local(options)
    chosen = choose(contents, options.capture, options.captured, name, options.limit)
    with opened() as target:
        report = replay(_with_progress(chosen), target, tolerance)
    reasons = exceeded(report, limits)
    table = {"model": options.model, "captured": chosen.model, **to_table(report), "failed_for": reasons}
    Output(is_json=options.json).show(table, lambda: _page(chosen, report, limits, reasons))
    return FAILED if reasons else DONE


Opened = Callable[[], AbstractContextManager["Target"]]


def _remote(options: argparse.Namespace) -> tuple[str, Opened]:
    from headrace.rpc.admin_client import Tls
    from headrace.rpc.inference_client import RemoteTarget

    tls = Tls(options.tls_ca, options.tls_certificate, options.tls_key)
    return options.model, lambda: RemoteTarget(options.url, tls, options.timeout, options.model, options.version)


def _local(options: argparse.Namespace) -> tuple[str, Opened]:
    """Raises ConfigError or LoadError for a model that cannot be served."""
    from headrace.cli import check_runtime
    from headrace.lifecycle.effective import resolve_model
    from headrace.plugins import load_backends
    from headrace.replay.targets import LocalTarget

    if options.version:
        raise ConfigError("--version: for --url alone; expected --model with the version's directory, MODEL/N")
    check_runtime()
    backends = load_backends()
    found = _find(options.model, options.models)
    config, fetched = found.model.config, found.fetched
    effective = resolve_model(config, fetched.model_directory, fetched.version_directory, backends)
    return config.name, lambda: LocalTarget(effective, fetched, backends)


def _find(model: str, repository: str) -> LocalModel:
    """1. A model file. 2. A version's directory. 3. A model's, or one of a repository, of which the newest version is taken."""
    from headrace.model_files import load_model_config
    from headrace.sources.base import Fetched, ModelRef, is_version_name

    path = Path(os.path.abspath(model))
    directory = path.parent if path.is_file() else path
    if repository or not path.exists() or not (path.is_file() or is_version_name(path.name)):
        return asyncio.run(open_model(model, repository))
    if is_version_name(directory.name):
        config = load_model_config(directory.parent, directory.parent.name)
        fetched, number = Fetched(directory.parent, directory), int(directory.name)
    else:
        config, fetched, number = ModelConfig(path.stem), Fetched(directory, directory), 1
    if path.is_file():
        config = dataclasses.replace(config, filename=path.name, backend=config.backend or _backend_of(path))
    return LocalModel(str(directory), ModelRef(config.name, config, {}), number, fetched)


def _backend_of(path: Path) -> str | None:
    """The one whose files end like that, where there is one."""
    from headrace.plugins import load_backends

    found = [name for name, backend in load_backends().items() if Path(backend.default_filename).suffix == path.suffix]
    return found[0] if len(found) == 1 else None


def _with_progress(chosen: Chosen) -> Iterator[Captured]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(chosen.read(), "replaying", chosen.count, console=console, transient=True, disable=not console.is_terminal)


# -- warm-up -----------------------------------------------------------------------------------------------------------


def _write_warm_up(options: argparse.Namespace, contents: Contents) -> int:
    """One of each combination of shapes first, and then the latest that are left."""
    from headrace.lifecycle.recorded import MOST_FILES
    from headrace.replay.messages import encode_request

    directory: Path = options.warm_up
    if (options.limit or 0) > MOST_FILES:
        raise ConfigError(f"--limit: a version takes at most {MOST_FILES} recorded requests, got {options.limit}")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"--warm-up: expected a new or empty directory, {directory} has files in it")
    chosen = choose(contents, options.capture, options.captured, "", None)
    picked = pick(chosen.read(), options.limit or WARM_UPS)
    if not picked:
        raise ConfigError(f"--warm-up: no request for '{chosen.model}' has all its inputs: they are redacted")
    directory.mkdir(parents=True, exist_ok=True)
    for number, captured in enumerate(picked, start=1):
        (directory / f"{number:04}.pb").write_bytes(encode_request(dataclasses.replace(captured, id=""), chosen.model))
    table = {"model": chosen.model, "requests": len(picked), "directory": str(directory)}
    Output(is_json=options.json).say(table, f"{len(picked)} requests for {chosen.model} written to {directory}")
    return DONE


def pick(requests: Iterator[Captured], most: int) -> list[Captured]:
    """At most so many, no two alike in the shapes of their inputs before all shapes are there; memory for so many and no more."""
    by_shape: dict[tuple[tuple[int, ...], ...], Captured] = {}
    others: deque[Captured] = deque(maxlen=most)
    for captured in requests:
        if captured.redacted_inputs:
            continue
        shapes = tuple([tensor.shape for tensor in captured.inputs])
        if shapes not in by_shape and len(by_shape) < most:
            by_shape[shapes] = captured
        else:
            others.append(captured)
    left = most - len(by_shape)
    return [*by_shape.values(), *(list(others)[-left:] if left else [])]


# -- what is said ------------------------------------------------------------------------------------------------------


def _page(chosen: Chosen, report: ReplayReport, limits: Limits, reasons: list[str]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from headrace.cli_tables import plain

    lines: list[RenderableType] = [plain(_title(chosen, report))]
    if report.outputs:
        lines += [Text(""), _output_table(report)]
    if report.seconds:
        took = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in report.seconds.items())
        lines += [Text(""), plain(f"answered in: {took}")]
    lines += [plain(f"problem: {problem}") for problem in report.problems]
    lines += [Text("")]
    if reasons:
        lines += [Text.assemble(("failed: ", "red"), plain(reason)) for reason in reasons]
    elif limits.max_flips is None and limits.max_outside is None:
        lines.append(Text("no limit was given: --max-flips, --rtol, --atol and --max-outside set some", "dim"))
    else:
        lines.append(Text("passed: within the limits", "green"))
    return Group(*lines)


def _title(chosen: Chosen, report: ReplayReport) -> str:
    parts = [f"{report.requests:,} requests ({report.rows:,} rows) captured of {chosen.model}"]
    if report.failed:
        parts.append(f"{report.failed:,} more failed")
    if report.left_out:
        parts.append(f"{report.left_out:,} left out, their inputs are redacted")
    return "; ".join(parts)


def _output_table(report: ReplayReport) -> RenderableType:
    from rich.table import Column, Table

    headers = ["rows", "beyond", "other class", "max |d|", "mean |d|", "max rel.", "mean rel."]
    columns = [Column("output", overflow="fold"), *(Column(header, justify="right", no_wrap=True) for header in headers)]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for output in report.outputs:
        flips = f"{output.flip_rate:.3%}" if output.judged else "-"
        measures = [output.max_absolute, output.mean_absolute, output.max_relative, output.mean_relative]
        numbers = [f"{value:.3g}" if value >= 0 else "-" for value in measures]
        table.add_row(output.name, f"{output.rows:,}", f"{output.outside_rate:.3%}", flips, *numbers)
    return table
