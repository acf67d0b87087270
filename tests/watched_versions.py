"""Drift reports as the monitor makes them, of made-up data that is counted, judged and alerted of by the real parts."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from headrace.config import DriftConfig
from headrace.drift.alarms import Alarms, findings
from headrace.drift.building import ReferenceBuilder
from headrace.drift.counting import BatchCounter, Counts
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.judgement import judge
from headrace.drift.plan import Plan
from headrace.drift.reference import Reference
from headrace.drift.reference_file import identified
from headrace.drift.sequential import SlowDrift
from headrace.drift.verdict import Alert, DriftReport
from headrace.drift.window import Windows
from numpy.typing import NDArray

BEGAN = 1_790_000_000.0
CONFIG = DriftConfig(window_rows=500, sliding_windows=4)
PLAN = Plan(
    (
        Feature(Side.INPUT, "passenger", "age", Kind.NUMERIC, Extract.COLUMN, 0),
        Feature(Side.INPUT, "passenger", "fare", Kind.NUMERIC, Extract.COLUMN, 1),
        Feature(Side.INPUT, "port", "value", Kind.CATEGORICAL, Extract.COLUMN, 0),
        Feature(Side.OUTPUT, "scores", "class", Kind.CATEGORICAL, Extract.CLASS),
        Feature(Side.OUTPUT, "scores", "confidence", Kind.NUMERIC, Extract.CONFIDENCE),
    ),
    ("input 'photo': it has 12 elements a row, of which 10 are watched",),
)
Arrays = dict[str, NDArray[Any]]


def rows_of(random: np.random.Generator, rows: int, *, shift: float = 0.0) -> tuple[Arrays, Arrays]:
    """Passengers; `shift` makes them older and the model less sure, and brings a new port."""
    passenger = np.stack([random.normal(35 + 12 * shift, 10, rows), random.lognormal(3, 1, rows)], axis=1).astype(np.float32)
    ports = np.array([b"Cherbourg", b"Queenstown", b"Southampton", b"Narvik"], object)
    chances = np.array([0.3, 0.2, 0.5, 0.0]) * (1 - 0.2 * shift) + np.array([0, 0, 0, 0.2 * shift])
    port = ports[random.choice(4, rows, p=chances)][:, None]
    score = np.clip(random.beta(8, 2 + 3 * shift, rows), 0.5, 1)
    is_second = random.random(rows) < 0.4 + 0.2 * shift
    scores = np.where(is_second[:, None], np.stack([1 - score, score], 1), np.stack([score, 1 - score], 1)).astype(np.float32)
    return {"passenger": passenger, "port": port}, {"scores": scores}


def reference(rows: int = 5000, seed: int = 1) -> Reference:
    builder = ReferenceBuilder("titanic", PLAN, bins=10)
    builder.add(*rows_of(np.random.default_rng(seed), rows), rows)
    return identified(builder.build("profile", data_digest="ab" * 32, created=BEGAN - 86400))


def report(shifts: tuple[float, ...] = (0.0,) * 6, *, version: int = 3, seed: int = 2, rows: int = 500) -> DriftReport:
    """After one window of `rows` for each of `shifts`."""
    random, base = np.random.default_rng(seed), reference()
    counter, windows, slow, alarms = BatchCounter(base), Windows(base, CONFIG, BEGAN), SlowDrift(base, CONFIG), Alarms("titanic", version)
    totals, latest, history, sliding, past = Counts.zero(base), None, [], None, deque[Alert]()
    for number, shift in enumerate(shifts, start=1):
        at = BEGAN + 60 * number
        counts = counter.count(*rows_of(random, rows, shift=shift), rows)
        totals.add(counts)
        ended = windows.add(counts, at)
        assert ended is not None
        latest = ended.counts
        history.append(judge(base, ended.counts, CONFIG, "tumbling", ended.began, at))
        whole = windows.sliding()
        sliding = judge(base, whole.counts, CONFIG, "sliding", whole.began, at) if whole is not None else None
        slow.update(ended.counts)
        found = findings(base, ended.counts, history[-1], sliding, slow.evidence())
        past.extend(alarms.update(base, found, at, totals.rows, at - BEGAN))
    return DriftReport(
        "titanic", version, base, totals=totals, latest=latest, seen_rows=totals.rows, skipped_rows=1200, dropped_rows=3, cpu_seconds=0.5,
        tumbling=history[-1] if history else None, sliding=sliding, slow=slow.evidence(), alerts=alarms.raised, history=tuple(history),
        past_alerts=tuple(past), config=CONFIG,
    )  # fmt: skip


CLEAN = (0.0,) * 6
DRIFTED = (0.0, 0.0, 0.0, 0.0, 0.5, 1.0)
OVER = (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
