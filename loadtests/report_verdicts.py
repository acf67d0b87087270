"""Two results of `compare`, before and after: which of their numbers are worse, the same, or better. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from loadtests.comparison import Report, Table
from loadtests.statistics import Spread

TOLERANCE = 0.05


class Verdict(Enum):
    WORSE = "worse"
    SAME = "same"
    BETTER = "better"


@dataclass(frozen=True, slots=True)
class Quantity:
    name: str
    is_better_higher: bool


RATE = Quantity("requests/s", True)
CPU = Quantity("CPU-µs/request", False)
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

    @property
    def ratio(self) -> Spread:
        """After over before: of the medians, and as far as the two ranges allow."""
        before = self.before
        return Spread(self.after.median / before.median, self.after.low / before.high, self.after.high / before.low)

    @property
    def verdict(self) -> Verdict:
        """The same unless the ranges are disjoint and the medians apart by more than TOLERANCE."""
        is_disjoint = self.after.low > self.before.high or self.after.high < self.before.low
        if not is_disjoint or abs(self.ratio.median - 1) <= TOLERANCE:
            return Verdict.SAME
        return Verdict.BETTER if (self.ratio.median > 1) == self.quantity.is_better_higher else Verdict.WORSE


def changes(before: Report, after: Report) -> list[Change]:
    """Of everything that both have measured."""
    found = []
    for model in after.models:
        for contestant in after.contestants:
            for concurrency in after.concurrencies:
                ours, theirs = before.select(contestant, model, concurrency), after.select(contestant, model, concurrency)
                if not ours or not theirs:
                    continue
                pairs = {
                    RATE: ([cell.rate for cell in ours], [cell.rate for cell in theirs]),
                    CPU: ([cell.cpu_us for cell in ours], [cell.cpu_us for cell in theirs]),
                    P50: ([cell.p50 * 1e3 for cell in ours], [cell.p50 * 1e3 for cell in theirs]),
                    P99: ([cell.p99 * 1e3 for cell in ours], [cell.p99 * 1e3 for cell in theirs]),
                }
                found += [
                    Change(contestant, model, concurrency, quantity, Spread.of(old), Spread.of(new))
                    for quantity, (old, new) in pairs.items()
                    if min(old) > 0
                ]
    return found


def is_worse(found: list[Change]) -> bool:
    return any(change.verdict is Verdict.WORSE for change in found)


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
        f"Worse or better: the ranges of the rounds are disjoint and the medians more than {TOLERANCE:.0%} apart. Two results "
        "of one machine on two days differ also in the machine: look whether the servers that have not changed say the same."
    )
    return Table("After over before", ["model", "concurrent", "server", "of", "before", "after", "ratio", "verdict"], rows, note)
