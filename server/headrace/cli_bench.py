"""`headrace bench`: the batch sizes, instances and threads that a model does most with on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from headrace.config import SourceConfig
from headrace.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.backends.base import BackendRegistry
    from headrace.bench.choice import Best, Choice, Measured, Setup
    from headrace.bench.runs import Progress, Subject
    from headrace.sources.base import Fetched, ModelRef

DONE, FAILED = 0, 1
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
    bench.add_argument("--models", default="", metavar="REPO", help="a directory of models, or any URI that `serve --models` takes")
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


@dataclass(frozen=True, slots=True)
class Found:
    """The model in its source; `toml` is the file to write, and its text, for --write."""

    model: ModelRef
    number: int
    fetched: Fetched
    toml: tuple[Path, str] | None


def run(options: argparse.Namespace) -> int:
    from headrace.cli import check_runtime
    from headrace.plugins import load_backends

    check_runtime()
    try:
        found = asyncio.run(_open(options))
        try:
            # Not on an event loop, which would keep a Ctrl-C to itself until the model is measured.
            return _bench(options, load_backends(), found)
        finally:
            found.fetched.release()
    except ConfigError:
        raise
    except HeadraceError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    except KeyboardInterrupt:
        reason = "interrupted, nothing was written"
    print(f"headrace: {options.model}: {reason}", file=sys.stderr)
    return FAILED


async def _open(options: argparse.Namespace) -> Found:
    """Its files are there until they are released."""
    from headrace.plugins import open_source

    uri, name = _locate(options.model, options.models)
    source = open_source(uri, SourceConfig())
    try:
        listing = await source.list()
        if name in listing.errors:
            raise HeadraceError(listing.errors[name])
        if name not in listing.models:
            raise ConfigError(f"no model '{name}' in {uri}; there are: {', '.join(sorted(listing.models)) or 'none'}")
        model = listing.models[name]
        number = _newest(model)
        fetched = await source.fetch(model, number)
        try:
            return Found(model, number, fetched, _to_write(uri, fetched) if options.write else None)
        except BaseException:
            fetched.release()
            raise
    finally:
        await source.close()


def _locate(model: str, repository: str) -> tuple[str, str]:
    """(source, the model's name in it)"""
    from headrace.model_files import model_name

    if repository:
        return repository, model
    if not Path(model).is_dir():
        raise ConfigError(f"no directory '{model}'; expected a model's, or --models REPOSITORY with the name of a model in it")
    return model, model_name(Path(model))


def _newest(model: ModelRef) -> int:
    from headrace.lifecycle.policy import select_versions

    numbers = select_versions(list(model.versions), model.config.version_policy)
    if not numbers:
        raise HeadraceError(f"version_policy '{model.config.version_policy}' selects none of its versions")
    return max(numbers)


def _to_write(uri: str, fetched: Fetched) -> tuple[Path, str]:
    """Before anything is measured for nothing. Raises ConfigError for a model whose settings cannot be written."""
    from headrace.bench.model_toml import FILENAME, read

    directory = fetched.model_directory
    root = Path(uri.removeprefix("file://")).expanduser()
    if not directory.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"--write: {uri} is no directory on this machine; leave it out and put what is found into the model's {FILENAME}")
    if (directory / "config.pbtxt").exists():
        raise ConfigError(
            f"--write: {directory.name} has a config.pbtxt, which is Triton's and is not written; leave --write out and put what is found "
            f"into it (max_batch_size, instance_group), or say its settings in a {FILENAME} instead (`headrace check` shows them)"
        )
    if not os.access(directory, os.W_OK):
        raise ConfigError(f"--write: no permission to write to {directory}")
    return directory / FILENAME, read(directory / FILENAME)


def _bench(options: argparse.Namespace, backends: BackendRegistry, found: Found) -> int:
    from headrace.bench.choice import choose
    from headrace.bench.model_toml import changes
    from headrace.bench.runs import Subject, available_cores, measure
    from headrace.lifecycle.inspection import inspect

    cores = available_cores(options.cores)
    inspection = inspect(found.model.config, found.fetched, backends)
    subject = Subject(inspection.effective, inspection, found.fetched, cores)
    subject, measured, notes = measure(subject, backends, options.seconds, _tell)
    kept = subject.effective.batching.slo
    slo = options.slo_ms / 1e3 if options.slo_ms else kept
    choice = choose(measured, subject.settings, slo=slo, is_kept=0 < kept <= slo, is_inline=subject.is_inline)
    values = changes(subject.settings, choice.settings)
    if found.toml is not None and values:
        _write(found, subject, values, backends)
    notes += _hints(subject, choice)
    if options.json:
        print(json.dumps({**_table(found, measured, choice, values), "notes": notes}, indent=2))
    else:
        print("\n".join(_report(found, subject, measured, choice, notes, values)))
    return DONE if choice.is_within_slo else FAILED


def _write(found: Found, subject: Subject, values: dict[str, int | list[int]], backends: BackendRegistry) -> None:
    """Nothing that the server would then refuse."""
    from headrace.bench.model_toml import edited, replace
    from headrace.config_loading import parse_model_toml
    from headrace.lifecycle.effective import resolve_model

    assert found.toml is not None
    path, before = found.toml
    directories = found.fetched.model_directory, found.fetched.version_directory

    def check(text: str) -> None:
        config = parse_model_toml(text.encode(), found.model.name)
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
    found: Found, subject: Subject, measured: Measured, choice: Choice, notes: Sequence[str], values: dict[str, int | list[int]]
) -> list[str]:
    before, after = subject.settings.setup, choice.settings.setup
    lines = [f"{found.model.name}:{found.number} on {len(subject.cores)} core{'s' if len(subject.cores) > 1 else ''}", ""]
    lines += [*(f"  {line}" for line in _rates(measured, after)), "", f"  now     {_summary(choice.now, before, measured)}"]
    if choice.settings != subject.settings:
        lines.append(f"  then    {_summary(choice.then, after, measured)}")
    lines += [f"  why     {reason}" for reason in choice.reasons]
    lines += [f"  note    {note}" for note in notes]
    lines += [f"  {'wrote' if found.toml else 'set  '}   {key} = {value}" for key, value in values.items()]
    if not values:
        lines.append("  The settings stay as they are.")
    elif not found.toml:
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


def _table(found: Found, measured: Measured, choice: Choice, values: dict[str, int | list[int]]) -> dict[str, Any]:
    """For machines. Seconds and rows a second, a number a round."""
    from headrace.bench.choice import rate

    return {
        "model": found.model.name,
        "version": found.number,
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
        "written": found.toml is not None and bool(values),
    }
