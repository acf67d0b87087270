"""What shadows compared, as metric families of one scrape."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.lifecycle.shadow import DISTANCE_EDGES, ShadowSnapshot
from headrace.telemetry.exposition import Family, HistogramFamily, format_labels


def shadow_lines(snapshots: Iterable[ShadowSnapshot], is_openmetrics: bool) -> list[str]:
    """The lines of all shadows that compare at present; none when there is none."""
    compared = Family("headrace_shadow_compared_total", "counter", "Copies whose answer was compared with the live one.")
    differing = Family("headrace_shadow_disagreements_total", "counter", "Compared answers that differ from the live ones.")
    dropped = Family("headrace_shadow_dropped_total", "counter", "Copies not made for want of room, or not taken by the candidate.")
    distances = HistogramFamily(
        "headrace_shadow_distance", "Largest |candidate - live| / (1 + |live|) of an answer's floating outputs.", DISTANCE_EDGES
    )
    for counts in snapshots:
        labels = format_labels({"model": counts.model, "candidate": str(counts.candidate)})
        compared.add(labels, counts.compared)
        differing.add(labels, counts.disagreeing)
        dropped.add(labels, counts.dropped)
        distances.add_histogram(labels, counts.buckets, counts.distance_sum)
    return [line for family in (compared, differing, dropped, distances) for line in family.lines(is_openmetrics)]
