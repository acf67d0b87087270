"""`headrace drift`: references made of data, and what a running server says of a version's drift."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli_local import LocalModel, add_repository, exit_code, open_model
from headrace.cli_models import Output, add_client_flags, call_server
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.drift.reference import Reference
    from headrace.rpc.admin_client import AdminClient

DONE, FAILED = 0, 1


def add_drift(drift: argparse.ArgumentParser) -> None:
    commands = drift.add_subparsers(required=True, metavar="COMMAND")
    profile = commands.add_parser(
        "profile",
        help="make a model's reference of data",
        description="Run a model on data and describe its inputs and outputs: the reference that live data is compared with.",
    )
    profile.add_argument("--model", required=True, metavar="MODEL", help="a model's directory, or with --models its name there")
    add_repository(profile)
    profile.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".npz, .npy, .csv, .parquet, or a directory that a server has captured into: data as in production",
    )
    profile.add_argument(
        "--label", default="", metavar="COLUMN", help="which column is the true class: then accuracy is estimated while it serves"
    )
    profile.add_argument("--bins", type=_bins, default=0, metavar="N", help="ranges of each number; left out: as model.toml says (10)")
    profile.add_argument(
        "--out", type=Path, metavar="FILE", help="left out: drift.msgpack beside the model's file, from where the server takes it"
    )
    profile.add_argument("--json", action="store_true", help="for machines")
    profile.set_defaults(run=_profile)

    show = commands.add_parser("show", help="show a reference's file", description="Show what a reference holds.")
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="for machines")
    show.set_defaults(run=_show)

    report = commands.add_parser(
        "report",
        help="a version's drift on a running server",
        description="Show what a running server has found of a version's drift, the worst features first.",
        parents=[add_client_flags()],
    )
    report.add_argument("model", metavar="MODEL")
    report.add_argument("--version", type=int, default=0, metavar="N", help="left out: the one that serves")
    report.add_argument("--feature", default="", metavar="NAME", help="its ranges, live beside the reference; as the report names it")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, that needs nothing else")
    report.add_argument("--fail-on-drift", action="store_true", help="exit with 1 while there is an alert, for pipelines")
    report.set_defaults(run=_report)


def _bins(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 2 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"expected 2 to 1000, got {text!r}")
    return int(text)


# -- profile -----------------------------------------------------------------------------------------------------------


def _profile(options: argparse.Namespace) -> int:
    from headrace.cli import check_runtime

    def work() -> int:
        local = asyncio.run(open_model(options.model, options.models))
        try:
            target = _target(options.out, local)
            reference, raw = _make(options, local)
        finally:
            local.fetched.release()
        _write(target, raw)
        _say(Output(is_json=options.json), reference, {"written": str(target), "bytes": len(raw)}, f"{target}: {len(raw):,} bytes")
        return DONE

    check_runtime()
    return exit_code(work, options.model, "interrupted, nothing was written")


def _target(out: Path | None, local: LocalModel) -> Path:
    """Before the model is run for nothing."""
    from headrace.drift.reference_file import FILENAME
    from headrace.sources.manifest import MANIFEST_NAME

    directory = local.fetched.version_directory
    if out is not None:
        if not out.parent.is_dir():
            raise ConfigError(f"--out: no directory {out.parent}")
        return out
    if not local.is_below_source():
        raise ConfigError(f"--out: expected a file: {local.uri} is no directory on this machine")
    if (directory / MANIFEST_NAME).exists():
        raise ConfigError(
            f"--out: expected a file: {directory} was published and must stay as it is; `headrace publish --reference FILE` "
            "publishes a new version with it"
        )
    return directory / FILENAME


def _make(options: argparse.Namespace, local: LocalModel) -> tuple[Reference, bytes]:
    from headrace.drift.reference_file import check_fits, decode, encode
    from headrace.lifecycle.effective import resolve_model
    from headrace.plugins import load_backends
    from headrace.profiling.data_files import digest
    from headrace.profiling.profile import Subject, profile

    backends = load_backends()
    directory = local.fetched.version_directory
    effective = resolve_model(local.model.config, local.fetched.model_directory, directory, backends)
    digests = [digest(path) for path in options.data if path.is_file()]
    data_digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""
    subject = Subject(effective, directory, options.label, options.bins)
    with _progress(options.data, local.model.name) as (chunks, tell):
        reference = profile(subject, chunks, backends, data_digest=data_digest, created=round(time.time()), tell=tell)
    raw = encode(reference)
    # As the server will read it: what it would refuse is not written.
    reference = decode(raw)
    check_fits(reference, effective.signature)
    return reference, raw


class _progress:  # noqa: N801  # a context manager by use
    """The chunks of all files, with a bar on standard error where that is a terminal."""

    def __init__(self, paths: list[Path], model: str) -> None:
        self._paths = paths
        self._model = model

    def __enter__(self) -> tuple[Iterator[Mapping[str, Any]], Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("profile", total=float(len(self._paths)), rows=0)
        self._bar.start()
        return self._chunks(), lambda rows: self._bar.update(self._task, rows=rows)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _chunks(self) -> Iterator[Mapping[str, Any]]:
        from headrace.profiling.captures import read_capture_chunks
        from headrace.profiling.data_files import read_chunks

        for number, path in enumerate(self._paths):
            chunks = read_capture_chunks(path, self._model) if path.is_dir() else read_chunks(path)
            for chunk, part in chunks:
                yield chunk
                self._bar.update(self._task, completed=number + part)


def _write(target: Path, raw: bytes) -> None:
    """Whole or not at all: a server may be watching."""
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.write_bytes(raw)
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


# -- show --------------------------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from headrace.drift.reference_file import decode

    def work() -> int:
        _say(Output(is_json=options.json), decode(options.file.read_bytes()), {}, "")
        return DONE

    return exit_code(work)


def _say(output: Output, reference: Reference, more: Mapping[str, object], last: str) -> None:
    from rich.console import Group
    from rich.text import Text

    from headrace.cli_drift_tables import reference_page

    table = {**dataclasses.asdict(reference), **more}
    output.show(table, lambda: Group(reference_page(reference), *([Text(last)] if last else [])))


# -- report ------------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    found: list[bool] = []

    def action(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
        from headrace.cli_drift_tables import feature_page, report_page, report_table
        from headrace.drift.page import render

        report = client.get_drift(options.model, options.version)
        found.append(bool(report.alerts))
        if options.html is not None:
            options.html.write_text(render(report, time.time()), encoding="utf-8")
        page = feature_page(report, options.feature) if options.feature else report_page(report, time.time())
        output.show(report_table(report), lambda: page)

    try:
        code = call_server(options, action)
    except OSError as error:
        print(f"headrace: {error.filename}: {error.strerror}", file=sys.stderr)
        return FAILED
    return FAILED if code == DONE and options.fail_on_drift and any(found) else code
