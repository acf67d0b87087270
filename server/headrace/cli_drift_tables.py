"""References and drift as `headrace drift` shows them: shapes in, text for rich out. Pure; `now` is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from headrace.cli_tables import moment, plain, span
from headrace.drift.ranking import Ranked, rank, worst_first
from headrace.drift.reference import FeatureReference, Reference
from headrace.drift.verdict import Alert, DriftReport
from headrace.errors import ConfigError

_GOOD, _BAD, _QUIET = "green", "red", "dim"
_BAR = 24
"""Characters of the longest bar."""
_SPARKS = "▁▂▃▄▅▆▇█"
_LATEST = 24
"""Windows of the sparkline."""
_WORST = 3
"""Features whose alerts are told in a sentence."""
_SHOWN = 40
"""Features of a report; the others are counted. `--json` has all."""


def reference_page(reference: Reference) -> RenderableType:
    """What a reference holds, a row a feature."""
    columns = [_left("feature"), _left("side"), _right("rows"), _right("missing"), _right("bins"), _left("range or categories")]
    rows = [
        [
            plain(each.feature.title),
            Text(each.feature.side.value),
            Text(f"{each.counted + each.missing + each.infinite:,}"),
            Text(f"{_part(each.missing, each):.2%}" if each.missing else ""),
            Text(str(len(each.counts))),
            plain(_describe(each)),
        ]
        for each in reference.features
    ]
    return Group(*_lines(_about(reference)), Text(""), _table(columns, rows))


def _about(reference: Reference) -> Iterator[tuple[str, str]]:
    made = f", {moment(reference.created)}" if reference.created else ""
    yield "reference", f"of {reference.model}: {reference.rows:,} rows, {len(reference.features)} features, from {reference.source}{made}"
    if reference.accuracy >= 0:
        fitted = f"; confidence calibrated with {reference.calibration.rows:,} rows" if reference.calibration is not None else ""
        yield "accuracy", f"{reference.accuracy:.2%} by its labels{fitted}"
    for each in reference.left_out:
        yield "left out", each


def _describe(each: FeatureReference) -> str:
    if each.is_numeric:
        return f"{each.minimum:.4g} to {each.maximum:.4g}, mean {each.mean:.4g}"
    total = max(each.counted, 1)
    common = sorted(zip(each.counts, each.labels, strict=True), reverse=True)
    texts = [f"{label or 'others'} {count / total:.0%}" for count, label in common if count][:4]
    return ", ".join(texts) + (f" and {len(each.categories) - 4} more" if len(each.categories) > 4 else "")


def _part(count: int, each: FeatureReference) -> float:
    return count / max(each.counted + each.missing + each.infinite, 1)


# -- a running server's report -----------------------------------------------------------------------------------------


def report_page(report: DriftReport, now: float) -> RenderableType:
    """Everything at a glance, the worst features first."""
    parts: list[RenderableType] = [Text(f"{report.model}:{report.version}", "bold"), *_lines(_state(report, now))]
    if report.alerts:
        parts += [Text(""), *_alerts(report.alerts, now)]
    ranked = rank(report)
    if ranked:
        parts += [Text(""), _features(ranked[:_SHOWN])]
        if len(ranked) > _SHOWN:
            parts.append(Text(f"and {len(ranked) - _SHOWN} more, none of them worse", _QUIET))
    return Group(*parts)


def _state(report: DriftReport, now: float) -> Iterator[tuple[str, str]]:
    reference = report.reference
    if reference is None:
        yield "reference", f"being learnt: {report.learnt_rows:,} of {report.learn_rows:,} rows" if report.learn_rows else "none: off"
        return
    yield from _about(reference)
    counted = f"{report.seen_rows:,} rows"
    if report.skipped_rows:
        counted += f", {report.skipped_rows:,} more left out to stay within the budget"
    if report.dropped_rows:
        counted += f", {report.dropped_rows:,} lost because too many waited"
    yield "counted", counted
    window = report.tumbling
    if window is None:
        yield "window", "none has ended yet"
        return
    yield "window", f"{window.rows:,} rows in {span(window.ended - window.began)}, ended {span(now - window.ended)} ago"
    if window.estimated_accuracy >= 0:
        beside = f", {window.reference_accuracy:.2%} in the reference" if window.reference_accuracy >= 0 else ""
        doubt = "; inputs drift, so confidence may be wrong" if any(alert.side == "input" for alert in report.alerts) else ""
        yield "accuracy", f"{window.estimated_accuracy:.2%} estimated (standard error {window.estimated_error:.2%}){beside}{doubt}"
    yield "alerts", f"{len(report.alerts)} raised, {sum(alert.is_raised for alert in report.past_alerts)} ever"


def _alerts(alerts: Sequence[Alert], now: float) -> list[Text]:
    """All of the version as a whole; of features the worst, since the table has them all."""
    shown = sum([not alert.feature for alert in alerts]) + _WORST
    lines = [_alert(alert, now) for alert in worst_first(alerts)[:shown]]
    if len(alerts) > shown:
        lines.append(Text(f"and {len(alerts) - shown} more", _QUIET))
    return lines


def _alert(alert: Alert, now: float) -> Text:
    after = f"after {alert.rows:,} rows and {span(alert.seconds)}, {span(now - alert.at)} ago"
    return Text.assemble((f"{alert.kind.replace('_', ' ')}: ", _BAD), plain(alert.text), (f"  {after}", _QUIET))


def _features(ranked: Sequence[Ranked]) -> Table:
    columns = [
        _left("feature"),
        _left("side"),
        _right("PSI"),
        _right("by chance"),
        _right("KS"),
        _right("missing"),
        _left("windows"),
        _left(""),
    ]
    rows = [
        [
            plain(each.reference.feature.title),
            Text(each.reference.feature.side.value),
            Text(f"{each.score.psi:.3f}"),
            Text(f"{each.score.psi_critical:.3f}"),
            Text(f"{each.score.ks:.3f}" if each.reference.is_numeric else ""),
            Text(f"{each.score.missing_rate:.1%}" if each.score.missing_rate else ""),
            Text(_sparkline(each.history[-_LATEST:])),
            Text("alert", _BAD) if each.is_raised else Text("drifts", _BAD) if each.score.is_drifting else Text("", _GOOD),
        ]
        for each in ranked
    ]
    return _table(columns, rows)


def _sparkline(values: Sequence[float]) -> str:
    """PSI over windows. The scale is one for all features and logarithmic: 0.001 or less to 1 or more."""
    steps = len(_SPARKS) - 1
    places = [min(max((math.log10(max(value, 1e-9)) + 3) / 3, 0.0), 1.0) for value in values]
    return "".join([_SPARKS[round(place * steps)] for place in places])


def feature_page(report: DriftReport, name: str) -> RenderableType:
    """One feature's bins, live beside the reference. Raises ConfigError for one that is not watched."""
    ranked = rank(report)
    found = next((each for each in ranked if name in (each.reference.feature.title, each.reference.feature.name)), None)
    if found is None:
        names = ", ".join([each.reference.feature.title for each in ranked][:8]) or "none: no window has ended"
        raise ConfigError(f"--feature: expected one of {names}{', ...' if len(ranked) > 8 else ''}; got {name!r}")
    each, score = found.reference, found.score
    psi = f"PSI {score.psi:.3f}, {score.psi_critical:.3f} by chance, over {score.rows:,} rows"
    head = f"{each.feature.title} ({each.feature.side.value}): {psi}"
    columns = [_left("category" if not each.is_numeric else "up to"), _right("reference"), _right("live"), _left("reference ░ live █")]
    largest = max([*found.expected, *found.live, 1e-9])
    rows = []
    for label, expected, live in zip(each.labels, found.expected, found.live, strict=True):
        bars = Text.assemble(("░" * round(expected / largest * _BAR), _QUIET), "\n", "█" * round(live / largest * _BAR))
        text = _edge(label) if each.is_numeric else label or "others"
        rows.append([plain(text), Text(f"{expected:.1%}"), Text(f"{live:.1%}"), bars])
    return Group(plain(head), Text(""), _table(columns, rows))


def _edge(label: str) -> str:
    return "more" if label == "+Inf" else f"{float(label):.6g}"


def report_table(report: DriftReport) -> dict[str, Any]:
    """For machines. A value that a statistic does not have is null, as JSON has no infinity."""
    latest = [
        {
            **dataclasses.asdict(each.reference.feature),
            "title": each.reference.feature.title,
            "labels": list(each.reference.labels),
            "expected": list(each.expected),
            "live": list(each.live),
            "is_raised": each.is_raised,
            **{key: _finite(value) for key, value in dataclasses.asdict(each.score).items()},
        }
        for each in rank(report)
    ]
    window = report.tumbling
    return {
        "model": report.model,
        "version": report.version,
        "reference": None if report.reference is None else {"rows": report.reference.rows, "source": report.reference.source},
        "learnt_rows": report.learnt_rows,
        "learn_rows": report.learn_rows,
        "seen_rows": report.seen_rows,
        "skipped_rows": report.skipped_rows,
        "dropped_rows": report.dropped_rows,
        "window": None if window is None else {"began": window.began, "ended": window.ended, "rows": window.rows},
        "estimated_accuracy": None if window is None or window.estimated_accuracy < 0 else window.estimated_accuracy,
        "reference_accuracy": None if window is None or window.reference_accuracy < 0 else window.reference_accuracy,
        "alerts": [{key: _finite(value) for key, value in dataclasses.asdict(alert).items()} for alert in report.alerts],
        "past_alerts": [{key: _finite(value) for key, value in dataclasses.asdict(alert).items()} for alert in report.past_alerts],
        "features": latest,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- pieces ------------------------------------------------------------------------------------------------------------


def _lines(fields: Iterator[tuple[str, str]]) -> list[RenderableType]:
    return [Text.assemble((f"{name:<10} ", _QUIET), plain(text)) for name, text in fields]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False, header_style=_QUIET)
    for row in rows:
        table.add_row(*row)
    return table


def _left(name: str) -> Column:
    return Column(name, overflow="fold")


def _right(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)
