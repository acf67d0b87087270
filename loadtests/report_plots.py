"""The pictures of the report: measured numbers in, SVG text out.

They carry their own style: everything that is ink takes the page's colour, so that they read on light and dark ground alike, also
as a file of their own. Colours are Okabe and Ito's, which people with any colour vision tell apart, the blue lighter for dark ground;
markers and labels at the ends of the lines say the same again.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from loadtests.statistics import Spread

PALETTE = ("#1F86C7", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#010203"
"""A colour that no line has; it becomes `currentColor`."""
STYLE: dict[Any, Any] = {  # keyed by what Matplotlib types as its own literals
    "svg.fonttype": "none", "font.size": 11, "font.family": ["DejaVu Sans", "sans-serif"],
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12,
}  # fmt: skip
WIDTH, HEIGHT = 8.0, 4.2
"""Inches, at 72 units each."""
LEFT = 0.115
"""Of the width, before the axes: as wide as the widest number beside them and their unit."""
_GROUND = "<style>:root{color:#1c1e21}@media(prefers-color-scheme:dark){:root{color:#dfe2e6}}</style>"


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: Spread


@dataclass(frozen=True, slots=True)
class Series:
    """One line. Those of one `name` have one colour; `is_secondary` draws it dashed and leaves the label to its sibling."""

    name: str
    points: Sequence[Point]
    is_secondary: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    key: str
    """Names the file and, with the series' name, the line's id."""
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    has_log_x: bool = False
    has_log_y: bool = False
    x_ticks: Sequence[float] = ()
    level: float | None = None
    """A thin horizontal line: what the numbers are to be compared with."""
    has_diagonal: bool = False
    """The line on which y is x."""
    has_steps: bool = False
    note: str = ""
    """What the reader should know to read it; below the picture."""


def draw(plot: Plot, colours: Mapping[str, int]) -> str:
    """The SVG element, for a page that sets the colour of its text.

    `colours`: which colour of the palette a name has, the same in all pictures of a report.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": plot.key}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((LEFT, 0.14, 1 - LEFT - _label_width(plot) / WIDTH, 0.75))
        axes.set_title(plot.title)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        _set_scales(axes, plot)
        names = list(dict.fromkeys(series.name for series in plot.series))
        for series in plot.series:
            # Ranges at the same concurrency would cover each other; on a logarithmic axis a hair to the side is a factor.
            beside = 1.025 ** (names.index(series.name) - (len(names) - 1) / 2) if plot.x_ticks and plot.has_log_x else 1.0
            _draw_series(axes, plot, series, colours[series.name], beside)
        _set_limits(axes, plot)
        _set_ticks(axes, plot)
        if plot.level is not None:
            axes.axhline(plot.level, color=INK, linewidth=1, alpha=0.6, linestyle=(0, (2, 2)), zorder=1)
        if plot.has_diagonal:
            ends = np.asarray(axes.get_xlim())
            (line,) = axes.plot(ends, ends, color=INK, linewidth=1, alpha=0.6, linestyle=(0, (2, 2)), zorder=1, scalex=False, scaley=False)
            line.set_gid(f"{plot.key}-ideal")
        axes.grid(True, which="major", color=INK, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        _label_ends(axes, plot, colours)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return clean_svg(text.getvalue(), plot.title)


def _set_scales(axes: Axes, plot: Plot) -> None:
    for axis, has_log, set_scale in ((axes.xaxis, plot.has_log_x, axes.set_xscale), (axes.yaxis, plot.has_log_y, axes.set_yscale)):
        if has_log:
            set_scale("log")
            axis.set_minor_formatter(NullFormatter())
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _draw_series(axes: Axes, plot: Plot, series: Series, colour: int, beside: float) -> None:
    x = [point.x * beside for point in series.points]
    y = np.array([point.y.median for point in series.points])
    beyond = [[point.y.median - point.y.low for point in series.points], [point.y.high - point.y.median for point in series.points]]
    hue = PALETTE[colour % len(PALETTE)]
    style = (0, (4, 2)) if series.is_secondary else "solid"
    gid = f"{plot.key}-{series.name}{'-2' if series.is_secondary else ''}"
    if plot.has_steps:
        axes.step(x, y, color=hue, linewidth=1.8, where="post")[0].set_gid(gid)
        return
    (line,) = axes.plot(x, y, color=hue, linewidth=1.8, linestyle=style, marker=MARKERS[colour % len(MARKERS)], markersize=5)
    line.set_gid(gid)
    if np.any(beyond):
        axes.errorbar(x, y, yerr=beyond, fmt="none", ecolor=hue, elinewidth=1.2, capsize=3, alpha=0.75)


def _set_limits(axes: Axes, plot: Plot) -> None:
    """From zero, unless the scale is logarithmic; there at least a whole decade, so that noise does not look like news."""
    if not plot.has_log_y:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low) if low < 0 else 0.0, max(high, 1.1 * (plot.level or 0.0)))
        return
    low, high = axes.get_ylim()
    if high / low < 10:
        middle = float(np.sqrt(low * high))
        axes.set_ylim(middle / 10**0.5, middle * 10**0.5)


def _set_ticks(axes: Axes, plot: Plot) -> None:
    """On a logarithmic scale as many as have room: over few decades also twice and five times their beginnings."""
    for axis, has_log, (low, high) in ((axes.xaxis, plot.has_log_x, axes.get_xlim()), (axes.yaxis, plot.has_log_y, axes.get_ylim())):
        if has_log:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 2e3 else (1.0,), numticks=12))
    if plot.x_ticks:
        axes.set_xticks(list(plot.x_ticks))


def _label_ends(axes: Axes, plot: Plot, colours: Mapping[str, int]) -> None:
    """Each line's name beside its last point, moved up or down as far as names would cover each other."""
    labelled = [series for series in plot.series if series.points and not series.is_secondary]
    transform = axes.transData + axes.transAxes.inverted()
    wanted = []
    for series in labelled:
        height = float(transform.transform((series.points[-1].x, max(series.points[-1].y.median, 1e-300)))[1])
        wanted.append(min(1.0, max(0.0, height)))
    for series, at, height in zip(labelled, wanted, spread_apart(wanted, 0.068), strict=True):
        hue = PALETTE[colours[series.name] % len(PALETTE)]
        axes.plot([1.005, 1.03], [at, height], transform=axes.transAxes, color=hue, linewidth=0.9, clip_on=False, alpha=0.8)
        axes.text(1.038, height, series.name, transform=axes.transAxes, color=hue, va="center", fontsize=10, fontweight="bold")


def _label_width(plot: Plot) -> float:
    """Inches that the names beside the lines take, with the strokes that lead to them."""
    return 0.4 + 0.098 * max((len(series.name) for series in plot.series), default=0)


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of those wanted, each near its own: overlapping ones form a block about their mean."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _bottom(blocks[-1], wanted, gap) < _bottom(blocks[-2], wanted, gap) + gap * len(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [0.0] * len(wanted)
    for block in blocks:
        for place, index in enumerate(block):
            placed[index] = _bottom(block, wanted, gap) + gap * place
    return placed


def _bottom(block: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[index] for index in block) / len(block) - gap * (len(block) - 1) / 2


def short_number(value: float) -> str:
    """`20k`, `1.5M`, `0.05`: what fits beside an axis."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.3g}"


def clean_svg(text: str, title: str) -> str:
    """Matplotlib's file as an element for a page: no prologue, nothing that names an address but namespaces, ids of ours alone."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    # Its style would be for every element of the page.
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def standalone(svg: str) -> str:
    """The element as a file, which sets the colour itself."""
    return re.sub(r"(<svg[^>]*>)", rf"\1{_GROUND}", svg, count=1)


def complementary_distribution(edges: Sequence[float], counts: Sequence[int]) -> list[tuple[float, float]]:
    """(latency, part of the requests that took longer), from a histogram of n bins and n + 1 edges. Raises ValueError."""
    if len(edges) != len(counts) + 1:
        raise ValueError(f"a histogram needs one edge more than bins, got {len(edges)} edges of {len(counts)} bins")
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError("the edges of a histogram have to rise")
    total = sum(counts)
    above, points = total, []
    for edge, count in zip(edges[1:], counts, strict=True):
        above -= count
        if count and above:
            points.append((float(edge), above / total))
    return points
