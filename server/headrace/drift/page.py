"""A drift report as one page of HTML that needs nothing else: tables and plots, for a mail, a ticket or a pipeline's artifacts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from headrace.drift.ranking import Ranked, rank, worst_first
from headrace.drift.verdict import DriftReport, WindowVerdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #667080; --line: #d9dee5; --paper: #fff; --live: #1f6feb; --was: #b9c2cf;
  --bad: #c2321f; --bad-paper: #fdf0ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --quiet: #98a2b0; --line: #333b46; --paper: #14181d; --live: #58a6ff;
  --was: #4d5866; --bad: #ff7b6b; --bad-paper: #2d1a18; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 72rem;
  padding: 0 1.25rem; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.about, footer, small { color: var(--quiet); }
.alerts { list-style: none; padding: 0; } .alerts li { background: var(--bad-paper); border-left: 3px solid var(--bad);
  padding: .35rem .75rem; margin: .35rem 0; }
.calm { border-left: 3px solid var(--line); padding: .35rem .75rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .75rem; } figure.bad { border-color: var(--bad); }
figcaption { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; } figcaption span { color: var(--quiet); white-space: nowrap; } .bad figcaption span { color: var(--bad); }
svg { width: 100%; height: auto; display: block; } svg text { font: 10px system-ui, sans-serif; fill: var(--quiet); }
.was { fill: var(--was); } .live { fill: var(--live); } .axis { stroke: var(--line); }
.path { fill: none; stroke: var(--live); stroke-width: 1.5; }
.limit { stroke: var(--bad); stroke-dasharray: 3 3; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; } th { color: var(--quiet); font-weight: 500; }
tr.bad td { color: var(--bad); } .scroll { overflow-x: auto; } .key { display: inline-block; width: .8em; height: .8em; }
"""
_PLOTTED = 24
_TOLD = 6
"""Alerts; the others fold out."""
_WIDTH, _HEIGHT, _FOOT = 300, 110, 16


def render(report: DriftReport, now: float) -> str:
    """`now`: seconds since 1970, said as when the report was made."""
    ranked = rank(report)
    title = f"Drift of {escape(report.model)}:{report.version}"
    body = [f"<h1>{title}</h1>", _about(report), *_alerts(report)]
    if ranked:
        plotted = ranked[:_PLOTTED]
        body.append(
            "<h2>Features, the worst first</h2><p class=about><span class=key style='background:var(--was)'></span> reference &nbsp; "
            "<span class=key style='background:var(--live)'></span> the latest window. Bars: parts of the rows in each bin.</p>"
        )
        body.append(f"<div class=plots>{''.join([_bars(each) for each in plotted])}</div>")
        if len(ranked) > len(plotted):
            body.append(f"<p class=about>{len(ranked) - len(plotted)} more in the table.</p>")
        body += [*_over_time(report, ranked), _table(ranked)]
    body.append(f"<footer><p>Made {_moment(now)} by Headrace.</p></footer>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return f"{head}<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"


def _about(report: DriftReport) -> str:
    reference, window = report.reference, report.tumbling
    if reference is None:
        return f"<p class=about>The reference is being learnt: {report.learnt_rows:,} of {report.learn_rows:,} rows.</p>"
    facts = [f"Reference: {reference.rows:,} rows, {escape(reference.source)}", f"{report.seen_rows:,} live rows counted"]
    if report.skipped_rows:
        facts.append(f"{report.skipped_rows:,} left out to stay within the budget")
    if window is not None:
        facts.append(f"latest window: {window.rows:,} rows, ended {_moment(window.ended)}")
        if window.estimated_accuracy >= 0:
            beside = f" ({window.reference_accuracy:.1%} in the reference)" if window.reference_accuracy >= 0 else ""
            doubt = ", of confidence that may be wrong, as inputs drift" if any(alert.side == "input" for alert in report.alerts) else ""
            facts.append(f"estimated accuracy {window.estimated_accuracy:.1%}{beside}{doubt}")
    return f"<p class=about>{'. '.join(facts)}.</p>"


def _alerts(report: DriftReport) -> list[str]:
    if not report.alerts:
        return ["<p class=calm>No alert.</p>"]
    lines = [
        f"<li>{escape(alert.text)} <small>after {alert.rows:,} rows, {_moment(alert.at)}</small></li>"
        for alert in worst_first(report.alerts)
    ]
    title = f"<h2>{len(lines)} alert{'s' if len(lines) > 1 else ''}</h2>"
    rest = f"<details><summary>{len(lines) - _TOLD} more</summary><ul class=alerts>{''.join(lines[_TOLD:])}</ul></details>"
    return [title, f"<ul class=alerts>{''.join(lines[:_TOLD])}</ul>", rest if len(lines) > _TOLD else ""]


def _bars(each: Ranked) -> str:
    """Pairs of bars, reference and live, labelled below by the first and the last range, or each category where they are few."""
    count = len(each.live)
    largest = max([*each.expected, *each.live, 1e-9])
    top, floor = 12, _HEIGHT - _FOOT
    step = _WIDTH / count
    parts = []
    for index, (was, live) in enumerate(zip(each.expected, each.live, strict=True)):
        for kind, value, shift in (("was", was, 0.1), ("live", live, 0.5)):
            height = value / largest * (floor - top)
            name = each.reference.labels[index] or "others"
            parts.append(
                f"<rect class={kind} x={index * step + shift * step:.1f} y={floor - height:.1f} width={0.4 * step:.1f} height={height:.1f}>"
                f"<title>{escape(name)}: {value:.1%}</title></rect>"
            )
    parts.append(f"<line class=axis x1=0 y1={floor} x2={_WIDTH} y2={floor} />")
    parts.append(f"<text x=0 y=9>{largest:.0%}</text>")
    for index, text in _ticks(each, count):
        anchor = "start" if index == 0 else "end" if index == count - 1 else "middle"
        at = 0 if index == 0 else _WIDTH if index == count - 1 else (index + 0.5) * step
        parts.append(f"<text x={at:.1f} y={_HEIGHT - 3} text-anchor={anchor}>{escape(text)}</text>")
    name = escape(each.reference.feature.title)
    caption = f"<b>{name}</b><span>PSI {each.score.psi:.3f} / {each.score.psi_critical:.3f}</span>"
    return (
        f"<figure{' class=bad' if each.is_raised else ''}><figcaption>{caption}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{name}: live beside the reference'>"
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(each: Ranked, count: int) -> list[tuple[int, str]]:
    labels = each.reference.labels
    if each.reference.is_numeric:
        if count < 2:
            return []
        return [(0, f"≤ {float(labels[0]):.3g}"), (count - 1, f"> {float(labels[-2]):.3g}")]
    texts = [label or "others" for label in labels]
    if sum(map(len, texts)) * 7 < _WIDTH:
        return list(enumerate(texts))
    return [(0, texts[0][:20]), (count - 1, texts[-1][:20])]


def _over_time(report: DriftReport, ranked: Sequence[Ranked]) -> list[str]:
    windows = report.history
    if len(windows) < 2:
        return []
    figures = []
    accuracies = [window.estimated_accuracy for window in windows]
    if min(accuracies) >= 0:
        expected = windows[-1].reference_accuracy
        figures.append(_line("estimated accuracy", accuracies, windows, expected if expected >= 0 else None, is_part=True))
    for each in ranked[:5]:
        figures.append(_line(f"PSI of {each.reference.feature.title}", each.history, windows, each.score.psi_critical))
    first, last = _moment(windows[0].ended), _moment(windows[-1].ended)
    about = f"<p class=about>{len(windows)} windows, {first} to {last}; dashed: what chance allows, or the reference's accuracy.</p>"
    return ["<h2>Over windows</h2>", about, f"<div class=plots>{''.join(figures)}</div>"]


def _line(title: str, values: Sequence[float], windows: Sequence[WindowVerdict], limit: float | None, *, is_part: bool = False) -> str:
    shown = [*values, *([limit] if limit is not None and math.isfinite(limit) else [])]
    low, high = (min(shown), max(shown)) if is_part else (0.0, max([*shown, 1e-9]))
    margin = (high - low) * 0.05 or 0.01
    low, high = (low - margin if is_part else 0.0), high + margin
    top, floor, left = 6, _HEIGHT - _FOOT, 34

    def y(value: float) -> float:
        return floor - (value - low) / (high - low) * (floor - top)

    step = (_WIDTH - left) / max(len(values) - 1, 1)
    path = " ".join([f"{'M' if not index else 'L'}{left + index * step:.1f} {y(value):.1f}" for index, value in enumerate(values)])
    parts = [f"<line class=axis x1={left} y1={floor} x2={_WIDTH} y2={floor} />"]
    parts += [f"<text x={left - 3} y={y(value) + 3:.1f} text-anchor=end>{_short(value, is_part)}</text>" for value in (low, high - margin)]
    if limit is not None and math.isfinite(limit):
        parts.append(f"<line class=limit x1={left} y1={y(limit):.1f} x2={_WIDTH} y2={y(limit):.1f} />")
    parts.append(f"<path class=path d='{path}' />")
    ends = ((left, "start", windows[0]), (_WIDTH, "end", windows[-1]))
    parts += [
        f"<text x={at} y={_HEIGHT - 3} text-anchor={anchor}>{datetime.fromtimestamp(window.ended, UTC):%H:%M:%S}</text>"
        for at, anchor, window in ends
    ]
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{_short(values[-1], is_part)}</span></figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{escape(title)} over windows'>{''.join(parts)}</svg></figure>"
    )


def _short(value: float, is_part: bool) -> str:
    return f"{value:.1%}" if is_part else f"{value:.2g}"


def _table(ranked: Sequence[Ranked]) -> str:
    head = "".join([f"<th>{name}" for name in ("feature", "side", "rows", "PSI", "by chance", "JS", "KS", "Wasserstein", "p", "missing")])
    rows = []
    for each in ranked:
        score, feature = each.score, each.reference.feature
        cells = [escape(feature.title), feature.side.value, f"{score.rows:,}", f"{score.psi:.4f}", f"{score.psi_critical:.4f}"]
        numeric = [f"{score.ks:.3f}", f"{score.wasserstein:.3f}"] if each.reference.is_numeric else ["", ""]
        cells += [f"{score.js:.4f}", *numeric, f"{score.p_value:.1g}", f"{score.missing_rate:.2%}"]
        rows.append(f"<tr{' class=bad' if each.is_raised else ''}>{''.join([f'<td>{cell}' for cell in cells])}")
    return f"<h2>All features</h2><div class=scroll><table><tr>{head}{''.join(rows)}</table></div>"


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
