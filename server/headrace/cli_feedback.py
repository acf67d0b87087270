"""`headrace feedback`: labels for answers that a running server has given, and what they show."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli_models import add_client_flags, run
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from headrace.cli_models import Output
    from headrace.feedback.feedbacks import FeedbackReport, Labelled
    from headrace.feedback.statistics import Classification, Regression
    from headrace.rpc.admin_client import AdminClient

AT_A_TIME = 1000
"""Requests whose labels go in one call."""
SHOWN = 10
"""Confusions that are listed; JSON has all."""
KINDS = ("auto", "classes", "names", "values")
FILE = """.csv with the columns id and label, a line a row; else JSON Lines of {"id": …, "label": one, or a list with one a row}; - is
standard input"""


def add_feedback(feedback: argparse.ArgumentParser) -> None:
    """Give the parser of `headrace feedback` its subcommands."""
    commands = feedback.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[AdminClient, argparse.Namespace, Output], None], doc: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=doc, description=doc[0].upper() + doc[1:] + ".", parents=[add_client_flags()])
        parser.add_argument("model", metavar="MODEL")
        parser.add_argument("--version", type=_number, default=0, metavar="N", help="left out: all that take labels")
        parser.set_defaults(run=run, action=action)
        return parser

    add("show", _show, "accuracy, calibration and confusion of each version, by the labels that came")
    send = add("send", _send, "send labels, which are joined with the answers by request id")
    send.add_argument("labels", type=Path, metavar="LABELS", help=FILE)
    send.add_argument(
        "--kind",
        choices=KINDS,
        default="auto",
        help="what the labels are: classes by index or by name, or values of a regression; auto: whole numbers are classes",
    )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a version's number, got {text!r}")
    return int(text)


# -- sending -----------------------------------------------------------------------------------------------------------


def _send(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    total: dict[str, int] = {}
    problems: list[str] = []
    for some in _batches(read_labels(options.labels, options.kind)):
        joined = client.send_feedback(options.model, some, options.version)
        for outcome, count in {**joined.outcomes, "matched_rows": joined.rows}.items():
            total[outcome] = total.get(outcome, 0) + count
        problems = [*problems, *joined.problems][:SHOWN]
    if not total:
        raise ConfigError(f"{options.labels}: expected labels, found none")
    rows = total["matched_rows"]
    said = [f"{count} {outcome}" for outcome, count in total.items() if outcome != "matched_rows" and (count or outcome == "matched")]
    lines = [f"{options.model}: {', '.join(said)} ({rows} rows)", *problems]
    output.say({"model": options.model, **total, "problems": problems}, "\n".join(lines))


def _batches(labelled: Iterable[Labelled]) -> Iterator[list[Labelled]]:
    some: list[Labelled] = []
    for each in labelled:
        some.append(each)
        if len(some) == AT_A_TIME:
            yield some
            some = []
    if some:
        yield some


def read_labels(path: Path, kind: str) -> Iterator[Labelled]:
    """Raises ConfigError with the line that is not as expected."""
    try:
        if str(path) == "-":
            yield from _read_lines(sys.stdin, "standard input", kind)
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_csv(file, str(path), kind) if path.suffix == ".csv" else _read_lines(file, str(path), kind)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8: {error.reason}") from None
    except csv.Error as error:
        raise ConfigError(f"{path}: expected comma-separated values: {error}") from None


def _read_lines(lines: Iterable[str], name: str, kind: str) -> Iterator[Labelled]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
            id, label = table["id"], table["label"]
            if not isinstance(id, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{name}:{number}: expected {{'id': 'a request id', 'label': …}}, got {line.strip()[:80]!r}") from None
        yield labelled_of(id, label if isinstance(label, list) else [label], kind, f"{name}:{number}")


def _read_csv(file: Iterable[str], name: str, kind: str) -> Iterator[Labelled]:
    """Lines of the same id that follow each other are the rows of one request."""
    reader = csv.DictReader(file)
    if not {"id", "label"} <= set(reader.fieldnames or ()):
        raise ConfigError(f"{name}: expected the columns id and label, got {', '.join(reader.fieldnames or ()) or 'nothing'}")
    id, labels, place = "", list[object](), ""
    for row in reader:
        if row["id"] != id and labels:
            yield labelled_of(id, labels, kind, place)
            labels = []
        id, place = row["id"], f"{name}:{reader.line_num}"
        labels.append(row["label"] if kind == "names" else _from_text(row["label"] or ""))
    if labels:
        yield labelled_of(id, labels, kind, place)


def _from_text(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def labelled_of(id: str, labels: Sequence[object], kind: str, place: str) -> Labelled:
    """Raises ConfigError for labels that are not of one kind."""
    from headrace.feedback.feedbacks import Labelled

    strange = next((each for each in labels if isinstance(each, bool) or not isinstance(each, (int, float, str)) or each == ""), labels)
    if strange is not labels:
        raise ConfigError(f"{place}: expected a number or a class's name as label, got {strange!r}")
    are_numbers = all(isinstance(label, (int, float)) for label in labels)
    if kind == "auto":
        are_whole = all(isinstance(label, int) for label in labels)
        kind = ("classes" if are_whole else "values") if are_numbers else "names"
    if not labels or (kind != "names" and not are_numbers) or (kind == "classes" and not all(isinstance(each, int) for each in labels)):
        raise ConfigError(f"{place}: expected {kind}, got {labels!r}")
    if kind == "classes" and not all(-(2**63) <= each < 2**63 for each in labels):  # type: ignore[operator]  # checked
        raise ConfigError(f"{place}: expected classes of 64 bits, got {labels!r}")
    if kind == "names":
        return Labelled(id, names=[str(label) for label in labels])
    return Labelled(id, classes=labels) if kind == "classes" else Labelled(id, values=labels)  # type: ignore[arg-type]  # checked


# -- showing -----------------------------------------------------------------------------------------------------------


def _show(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    reports = client.get_feedback(options.model, options.version)
    output.show([to_table(report) for report in reports], lambda: feedback_page(reports))


def to_table(report: FeedbackReport) -> dict[str, Any]:
    """For machines."""
    table: dict[str, Any] = {
        name: getattr(report, name) for name in ("model", "version", "output", "waiting_rows", "unidentified", "replaced")
    }
    right, errors = report.classification, report.regression
    if right is not None:
        counts = [{"label": label, "predicted": guess, "rows": rows} for (label, guess), rows in sorted(right.confusion.items())]
        table["classification"] = {
            **dataclasses.asdict(right),
            "accuracy": right.accuracy,
            "interval": list(right.interval),
            "recent_accuracy": right.recent_accuracy,
            "confusion": counts,
        }
        table["classes"] = {str(index): name for index, name in report.classes}
    if errors is not None:
        table["regression"] = {**dataclasses.asdict(errors), "mae": errors.mae, "rmse": errors.rmse, "bias": errors.bias}
    return table


def feedback_page(reports: Sequence[FeedbackReport]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for report in reports:
        parts += [Text(f"{report.model}:{report.version}  {report.output}", "bold"), _fields(report), Text("")]
        if report.classification is not None and report.classification.rows:
            parts += [*_classes(report.classification, dict(report.classes)), Text("")]
    return Group(*parts)


def _fields(report: FeedbackReport) -> Table:
    from headrace.cli_tables import plain

    right, errors = report.classification, report.regression
    fields = list(_accuracy(right)) if right is not None else list(_errors(errors)) if errors is not None else []
    fields.append(("waiting", f"{report.waiting_rows:,} rows without labels as yet"))
    if report.unidentified:
        fields.append(("without id", f"{report.unidentified:,} requests, for which no labels can come"))
    if report.replaced:
        fields.append(("id used again", f"{report.replaced:,} requests, of which the earlier answer is lost"))
    table = _plain_table()
    for name, value in fields:
        table.add_row(name, plain(value))
    return table


def _accuracy(right: Classification) -> Iterator[tuple[str, str]]:
    yield "labelled", f"{right.rows:,} rows"
    if right.rows:
        low, high = right.interval
        recent = f"of the latest {right.recent_rows:,}: {right.recent_accuracy:.2%}"
        yield "accuracy", f"{right.accuracy:.2%} (95 %: {low:.2%} to {high:.2%}; {recent})"
    if right.calibration_error >= 0:
        yield "calibration", f"off by {right.calibration_error:.2%} (ECE)"


def _errors(errors: Regression) -> Iterator[tuple[str, str]]:
    yield "labelled", f"{errors.rows:,} rows"
    if errors.rows:
        recent = f"of the latest {errors.recent_rows:,}: {errors.recent_mae:.4g}"
        yield "error", f"mean absolute {errors.mae:.4g} ({recent}), root mean square {errors.rmse:.4g}, bias {errors.bias:+.4g}"


def _classes(right: Classification, names: Mapping[int, str]) -> list[RenderableType]:
    from rich.text import Text

    from headrace.cli_tables import plain

    def name(index: int) -> str:
        return names.get(index, str(index)) if index >= 0 else "(other)"

    bins = _plain_table("confidence", "rows", "is right", "is sure")
    for each in right.bins:
        bins.add_row(f"{each.lower:.2f} - {each.upper:.2f}", f"{each.rows:,}", f"{each.accuracy:.1%}", f"{each.confidence:.1%}")
    wrong = sorted([(rows, pair) for pair, rows in right.confusion.items() if pair[0] != pair[1] or pair[0] < 0], reverse=True)
    confusion = _plain_table("true", "predicted", "rows", "of the true class")
    for rows, (label, predicted) in wrong[:SHOWN]:
        total = sum([count for (each, _), count in right.confusion.items() if each == label])
        confusion.add_row(plain(name(label)), plain(name(predicted)), f"{rows:,}", f"{rows / total:.1%}")
    parts: list[RenderableType] = [bins, Text("")] if right.bins else []
    return [*parts, confusion] if wrong else parts


_NUMBERS = ("rows", "is right", "is sure", "of the true class")


def _plain_table(*headers: str) -> Table:
    from rich.table import Column, Table

    columns = [Column(header, justify="right" if header in _NUMBERS else "left", overflow="fold") for header in headers]
    columns = columns or [Column(style="dim", no_wrap=True), Column(ratio=1)]
    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=bool(headers))
