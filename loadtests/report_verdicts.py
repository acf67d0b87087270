"""Two results of `compare`, before and after: which of their numbers are worse, the same, or better. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from loadtests.comparison import ECHO, Cell, Report, Table, echoes_of
from loadtests.statistics import Spread

TOLERANCE = 0.05
ENOUGH_ROUNDS = 3
"""On both sides. The range of one round is a point, and all points are disjoint."""


class Verdict(Enum):
    WORSE = "worse"
    SAME = "same"
    BETTER = "better"
    UNKNOWN = "too few rounds"


@dataclass(frozen=True, slots=True)
class Quantity:
    name: str
    is_better_higher: bool


RATE = Quantity("requests/s", True)
CPU = Quantity("CPU-µs/request", False)
OF_ECHO = Quantity("rate / echo's", True)
P50 = Quantity("p50 ms", False)
P99 = Quantity("p99 ms", False)


@dataclass(frozen=True, slots=True)
class Change:
    contestant: str
    model: str
    concurrency: int
    quantity: Quantity
    before: Spread
    after: Spread
    rounds: int
    """Of the side that has fewer."""

    @property
    def ratio(self) -> Spread:
        """After over before: of the medians, and as far as the two ranges allow."""
        before = self.before
        return Spread(self.after.median / before.median, self.after.low / before.high, self.after.high / before.low)

    @property
    def verdict(self) -> Verdict:
        """The same unless the ranges are disjoint and the medians apart by more than TOLERANCE."""
        if self.rounds < ENOUGH_ROUNDS:
            return Verdict.UNKNOWN
        is_disjoint = self.after.low > self.before.high or self.after.high < self.before.low
        if not is_disjoint or abs(self.ratio.median - 1) <= TOLERANCE:
            return Verdict.SAME
        return Verdict.BETTER if (self.ratio.median > 1) == self.quantity.is_better_higher else Verdict.WORSE


def changes(before: Report, after: Report) -> list[Change]:
    """Of everything that both have measured."""
    return [
        Change(contestant, model, concurrency, quantity, Spread.of(old), Spread.of(new), min(len(old), len(new)))
        for model in after.models
        for contestant in after.contestants
        for concurrency in after.concurrencies
        for quantity, values in _quantities(contestant, model, concurrency).items()
        if (old := values(before)) and (new := values(after)) and min(old) > 0
    ]


def _quantities(contestant: str, model: str, concurrency: int) -> dict[Quantity, Callable[[Report], list[float]]]:
    """Each with what gives its value in every round of a report."""

    def of_cells(value: Callable[[Cell], float]) -> Callable[[Report], list[float]]:
        return lambda report: [value(cell) for cell in report.select(contestant, model, concurrency)]

    def of_echo(report: Report) -> list[float]:
        echoes = echoes_of(contestant, report.contestants)
        return report.ratios(contestant, echoes[0], model, concurrency) if len(echoes) == 1 else []

    return {
        RATE: of_cells(lambda cell: cell.rate),
        OF_ECHO: of_echo,
        CPU: of_cells(lambda cell: cell.cpu_us),
        P50: of_cells(lambda cell: cell.p50 * 1e3),
        P99: of_cells(lambda cell: cell.p99 * 1e3),
    }


def is_worse(found: list[Change]) -> bool:
    """Whether a server that infers is. When an echo is, the machine is, or the transport."""
    return any(change.verdict is Verdict.WORSE and not change.contestant.startswith(ECHO) for change in found)


def verdict_table(found: list[Change]) -> Table:
    rows = [
        [
            change.model,
            str(change.concurrency),
            change.contestant,
            change.quantity.name,
            change.before.text(),
            change.after.text(),
            change.ratio.text(),
            change.verdict.value,
        ]
        for change in found
    ]
    note = (
        f"Worse or better: of {ENOUGH_ROUNDS} rounds or more the ranges are disjoint and the medians more than {TOLERANCE:.0%} apart. "
        "Two results of one machine on two days differ also in the machine: where an echo has changed, only the rates over it compare."
    )
    return Table("After over before", ["model", "concurrent", "server", "of", "before", "after", "ratio", "verdict"], rows, note)
