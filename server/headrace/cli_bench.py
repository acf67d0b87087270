"""`headrace bench`: the batch sizes, instances and threads that a model does most with on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from headrace.cli_local import LocalModel, add_repository, exit_code, open_model
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.backends.base import BackendRegistry
    from headrace.bench.choice import Best, Choice, Measured, Setup
    from headrace.bench.runs import Progress, Subject

DONE, FAILED = 0, 1
Toml = tuple[Path, str]
"""The file to write settings into, and its text."""
SECONDS = 1.5
NOISY = 0.1
"""Of the rate, from round to round; idle machines stay within half of that."""
DESCRIPTION = """
Measure a model with every sensible number of instances and threads, at every batch size, and say which it should be served with on this
machine, and why. Measures what is there, so let nothing else run meanwhile. Changes nothing without --write.
"""


def add_bench(bench: argparse.ArgumentParser) -> None:
    bench.description = DESCRIPTION
    bench.add_argument("model", metavar="MODEL", help="a model's directory, or with --models its name there")
    add_repository(bench)
    bench.add_argument(
        "--seconds", type=_positive, default=SECONDS, metavar="N", help=f"for each setup and batch size, over three rounds ({SECONDS:g})"
    )
    bench.add_argument("--cores", type=int, metavar="N", help="that the server will have; left out: all that this process may use")
    bench.add_argument(
        "--slo-ms",
        type=_positive,
        metavar="MS",
        help="95 of 100 batches must take at most so long; waiting for a free instance not included; left out: slo_ms of the model",
    )
    bench.add_argument("--write", action="store_true", help="put the settings into the model's model.toml, comments kept")
    bench.add_argument("--json", action="store_true", help="for machines")
    bench.set_defaults(run=run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def run(options: argparse.Namespace) -> int:
    from headrace.cli import check_runtime
    from headrace.plugins import load_backends

    def work() -> int:
        local = asyncio.run(open_model(options.model, options.models))
        try:
            # Not on an event loop, which would keep a Ctrl-C to itself until the model is measured.
            return _bench(options, load_backends(), local, _to_write(local) if options.write else None)
        finally:
            local.fetched.release()

    check_runtime()
    return exit_code(work, options.model, "interrupted, nothing was written")


def _to_write(local: LocalModel) -> Toml:
    """Before anything is measured for nothing. Raises ConfigError for a model whose settings cannot be written."""
    from headrace.bench.model_toml import FILENAME, read

    directory = local.fetched.model_directory
    if not local.is_below_source():
        raise ConfigError(f"--write: {local.uri} is no directory on this machine; leave it out and put what is found into its {FILENAME}")
    if (directory / "config.pbtxt").exists():
        raise ConfigError(
            f"--write: {directory.name} has a config.pbtxt, which is Triton's and is not written; leave --write out and put what is found "
            f"into it (max_batch_size, instance_group), or say its settings in a {FILENAME} instead (`headrace check` shows them)"
        )
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"--write: no permission to write to {directory}")
    return directory / FILENAME, read(directory / FILENAME)


def _bench(options: argparse.Namespace, backends: BackendRegistry, local: LocalModel, toml: Toml | None) -> int:
    from headrace.bench.choice import choose
    from headrace.bench.model_toml import changes
    from headrace.bench.runs import Subject, available_cores, measure
    from headrace.lifecycle.inspection import inspect

    cores = available_cores(options.cores)
    inspection = inspect(local.model.config, local.fetched, backends)
    subject = Subject(inspection.effective, inspection, local.fetched, cores)
    subject, measured, notes = measure(subject, backends, options.seconds, _tell)
    kept = subject.effective.batching.slo
    slo = options.slo_ms / 1e3 if options.slo_ms else kept
    choice = choose(measured, subject.settings, slo=slo, is_kept=0 < kept <= slo, is_inline=subject.is_inline)
    values = changes(subject.settings, choice.settings)
    if toml is not None and values:
        _write(local, toml, subject, values, backends)
    notes += _hints(subject, choice)
    if options.json:
        print(json.dumps({**_table(local, measured, choice, values, is_written=toml is not None), "notes": notes}, indent=2))
    else:
        print("\n".join(_report(local, subject, measured, choice, notes, values, is_written=toml is not None)))
    return DONE if choice.is_within_slo else FAILED


def _write(local: LocalModel, toml: Toml, subject: Subject, values: dict[str, int | list[int]], backends: BackendRegistry) -> None:
    """Nothing that the server would then refuse."""
    from headrace.bench.model_toml import edited, replace
    from headrace.config_loading import parse_model_toml
    from headrace.lifecycle.effective import resolve_model

    path, before = toml
    directories = local.fetched.model_directory, local.fetched.version_directory

    def check(text: str) -> None:
        config = parse_model_toml(text.encode(), local.model.name)
        resolve_model(config, *directories, backends, subject.effective.artifact)

    replace(path, before, edited(before, values), check)


# -- what is said ------------------------------------------------------------------------------------------------------


def _tell(progress: Progress) -> None:
    from headrace.bench.choice import rate

    rates = {rows: rate(progress.setup, rows, sample) for rows, sample in progress.sizes.items()}
    best = max(rates, key=lambda rows: rates[rows])
    line = f"{progress.done}/{progress.of}  {progress.setup}: {_number(rates[best])} rows/s at batches of {best}"
    print(line, file=sys.stderr, flush=True)


def _hints(subject: Subject, choice: Choice) -> list[str]:
    from headrace.lifecycle.warm_up import has_free_dimension

    hints = []
    spread = (max(choice.now.rates) - min(choice.now.rates)) / choice.now.rate
    if spread > NOISY:
        hints.append(
            f"the same setup differed by {100 * spread:.0f} % from round to round: something else was running; measure again without it"
        )
    largest = choice.settings.max_batch_size
    if choice.then.rows == largest > 1 and largest == subject.settings.max_batch_size:
        hints.append(f"the largest batch does most: a higher max_batch_size than {largest} may do more; set one and measure again")
    if not subject.inspection.recorded and has_free_dimension(subject.effective.signature):
        hints.append(
            "its free dimensions were guessed: what was measured holds for such inputs; recorded requests in warmup/ are taken instead"
        )
    return hints


def _report(
    local: LocalModel,
    subject: Subject,
    measured: Measured,
    choice: Choice,
    notes: Sequence[str],
    values: dict[str, int | list[int]],
    *,
    is_written: bool,
) -> list[str]:
    before, after = subject.settings.setup, choice.settings.setup
    lines = [f"{local.model.name}:{local.number} on {len(subject.cores)} core{'s' if len(subject.cores) > 1 else ''}", ""]
    lines += [*(f"  {line}" for line in _rates(measured, after)), "", f"  now     {_summary(choice.now, before, measured)}"]
    if choice.settings != subject.settings:
        lines.append(f"  then    {_summary(choice.then, after, measured)}")
    lines += [f"  why     {reason}" for reason in choice.reasons]
    lines += [f"  note    {note}" for note in notes]
    lines += [f"  {'wrote' if is_written else 'set  '}   {key} = {value}" for key, value in values.items()]
    if not values:
        lines.append("  The settings stay as they are.")
    elif not is_written:
        lines.append("  In model.toml, that is; --write puts it there.")
    return [*lines, ""]


def _summary(best: Best, setup: Setup, measured: Measured) -> str:
    rows = min(measured[setup])
    took = median(sample.mean for sample in measured[setup][rows])
    first = f"{'one row' if rows == 1 else f'{rows} rows'} in {took * 1e3:.3g} ms"
    return f"{_number(best.rate)} rows/s with {setup} and batches of {best.rows}; {first}"


def _rates(measured: Measured, chosen: Setup) -> list[str]:
    """Rows a second by setup and batch size; the chosen one is marked."""
    from headrace.bench.choice import rate

    sizes = sorted({rows for found in measured.values() for rows in found})
    cells = [["", "instances", "threads", *(f"at {rows}" for rows in sizes)]]
    for setup, found in sorted(measured.items()):
        row = [">" if setup == chosen else "", str(setup.instances), str(setup.threads)]
        for rows in sizes:
            rates = [rate(setup, rows, sample) for sample in found.get(rows, ())]
            row.append(_number(median(rates)) if rates else "")
        cells.append(row)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["rows/s by rows of a batch:", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(
    local: LocalModel, measured: Measured, choice: Choice, values: dict[str, int | list[int]], *, is_written: bool
) -> dict[str, Any]:
    """For machines. Seconds and rows a second, a number a round."""
    from headrace.bench.choice import rate

    return {
        "model": local.model.name,
        "version": local.number,
        "measured": [
            {
                "instances": setup.instances,
                "threads": setup.threads,
                "rows": rows,
                "rates": [rate(setup, rows, sample) for sample in samples],
                "seconds": [sample.mean for sample in samples],
                "p95_seconds": [sample.p95 for sample in samples],
            }
            for setup, sizes in sorted(measured.items())
            for rows, samples in sorted(sizes.items())
        ],
        "now": {"rate": choice.now.rate, "rows": choice.now.rows},
        "then": {"rate": choice.then.rate, "rows": choice.then.rows},
        "reasons": list(choice.reasons),
        "is_within_slo": choice.is_within_slo,
        "settings": values,
        "written": is_written and bool(values),
    }
