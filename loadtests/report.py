"""Measured results as a page that shows them, and two of them beside each other.

    python -m loadtests.report RESULT.json... --out report.html [--pictures DIR] [--table table.md]
    python -m loadtests.report --compare BEFORE.json AFTER.json [--out report.html]

The page is one file: the pictures are in it, and it asks the network for nothing. RESULT is what `compare --json` or
`scenarios --json` wrote; a kind that is not known is skipped with a sentence. `--pictures` writes the pictures as files as well,
`--table` a table of rates as markdown. With `--compare` the exit code is 1 when something got worse.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from loadtests import comparison, report_scenarios
from loadtests.comparison import Report, Table, from_json, noise_text, summary, tables
from loadtests.machine import Noise
from loadtests.report_figures import compare_plots, scenario_plots
from loadtests.report_plots import Plot, draw, standalone
from loadtests.report_verdicts import changes, is_worse, verdict_table
from loadtests.statistics import markdown_table

_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True, slots=True)
class Section:
    """What there is to show of one result."""

    title: str
    tables: Sequence[Table]
    plots: Sequence[Plot] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    failures: Sequence[str] = ()
    sentence: str = ""


def section(name: str, content: Mapping[str, Any]) -> Section:
    """Raises ValueError where a known kind lacks something."""
    kind = content.get("kind", comparison.KIND if "cells" in content else None)
    if kind == comparison.KIND:
        return _compare_section(name, content)
    if kind == report_scenarios.KIND:
        return _scenarios_section(name, content)
    return Section(name, [], sentence=f"Skipped: its kind is {kind!r}, and this page shows {comparison.KIND} and {report_scenarios.KIND}.")


def _compare_section(name: str, content: Mapping[str, Any]) -> Section:
    report = from_json(content)
    return Section(
        f"Closed loop: servers beside each other ({name})",
        tables(report, report.contestants, report.models, report.concurrencies),
        compare_plots(report),
        _conditions(content),
        report.command,
        report.failures,
    )


def _scenarios_section(name: str, content: Mapping[str, Any]) -> Section:
    found = report_scenarios.loads(report_scenarios.read_runs(content))
    return Section(
        f"Open loop: what users see ({name})",
        [report_scenarios.scenario_table("By scenario and load", found)],
        scenario_plots(found),
        _conditions(content),
        str(content.get("command", "")),
        list(content.get("failures", ())),
        " ".join(content.get("notes", ())),
    )


def _conditions(content: Mapping[str, Any]) -> dict[str, str]:
    said = {key: str(value) for part in ("facts", "settings") for key, value in content.get(part, {}).items()}
    if probes := content.get("noise"):
        said["noise probe (fixed work, µs)"] = noise_text([Noise(**probe) for probe in probes])
    return said


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page. A server has one colour in all of it."""
    colours: dict[str, int] = {}
    for each in sections:
        for plot in each.plots:
            for series in plot.series:
                colours.setdefault(series.name, len(colours))
    body = "\n".join(_section_html(each, colours) for each in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{_STYLE.read_text()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section_html(shown: Section, colours: Mapping[str, int]) -> str:
    parts = [f"<h2>{escape(shown.title)}</h2>"]
    parts += [f"<p>{escape(shown.sentence)}</p>"] if shown.sentence else []
    parts += ["<ul>", *(f'<li class="failure">{escape(failure)}</li>' for failure in shown.failures), "</ul>"] if shown.failures else []
    if shown.plots:
        parts += ['<div class="pictures">', *(_figure_html(plot, colours) for plot in shown.plots), "</div>"]
    parts += [_table_html(table) for table in shown.tables]
    if shown.conditions or shown.command:
        parts += ["<h3>Conditions</h3>", f"<p><code>{escape(shown.command)}</code></p>" if shown.command else "", "<dl>"]
        parts += [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in shown.conditions.items()]
        parts.append("</dl>")
    return "\n".join(parts)


def _figure_html(plot: Plot, colours: Mapping[str, int]) -> str:
    return f"<figure>{draw(plot, colours)}<figcaption>{escape(plot.note)}</figcaption></figure>"


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(_cell_html(cell) for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>\n"
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n{note}'
    )


def _cell_html(text: str) -> str:
    kind = f' class="{text}"' if text in ("worse", "better") else ""
    return f"<td{kind}>{escape(text)}</td>"


def write_pictures(directory: Path, sections: Sequence[Section]) -> None:
    """Each plot as KEY.svg. A file of that name is replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(series.name for each in sections for plot in each.plots for series in plot.series)
    colours = {name: number for number, name in enumerate(names)}
    for plot in (plot for each in sections for plot in each.plots):
        (directory / f"{re.sub('[^A-Za-z0-9.-]+', '-', plot.key)}.svg").write_text(standalone(draw(plot, colours)))


def summary_markdown(report: Report) -> str:
    """A table for a page about the whole, with the machine and the command that made it."""
    table = summary(report)
    said = [f"{report.facts['cpu']}, {report.facts.get('cores', '?')} cores"] if "cpu" in report.facts else []
    said += [str(report.settings["date"])] if "date" in report.settings else []
    said += [f"`{report.command}`"] if report.command else []
    return "\n\n".join(part for part in (markdown_table(table.header, table.rows), "; ".join(said)) if part) + "\n"


def _read(path: Path) -> dict[str, Any]:
    """Raises ValueError that names the file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON of a result, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the JSON of a result, got a {type(content).__name__}")
    return content


def compare(before: Path, after: Path, out: Path | None) -> int:
    found = changes(from_json(_read(before)), from_json(_read(after)))
    if not found:
        raise ValueError(f"{before} and {after} have no server, model and concurrency in common")
    table = verdict_table(found)
    print(markdown_table(table.header, table.rows), f"\n{table.note}")
    if out is not None:
        shown = [
            Section(f"{before.name} and {after.name}", [table]),
            section(after.name, _read(after)),
            section(before.name, _read(before)),
        ]
        out.write_text(page("Two measurements of Headrace", shown))
    return 1 if is_worse(found) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="loadtests.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE.json", "AFTER.json"))
    parser.add_argument("--out", type=Path, help="the page (default: report.html, and with --compare none)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the pictures here, one SVG each")
    parser.add_argument("--table", type=Path, help="write the rates of the first result, a comparison, here as markdown")
    arguments = parser.parse_args()
    if bool(arguments.compare) == bool(arguments.results):
        parser.error("expected results, or --compare with two of them")
    try:
        if arguments.compare:
            before, after = arguments.compare
            return compare(before, after, arguments.out)
        sections = [section(path.name, _read(path)) for path in arguments.results]
        table = summary_markdown(from_json(_read(arguments.results[0]))) if arguments.table else ""
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    (arguments.out or Path("report.html")).write_text(page("Measurements of Headrace", sections))
    if arguments.pictures:
        write_pictures(arguments.pictures, sections)
    if arguments.table:
        arguments.table.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
