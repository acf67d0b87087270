"""Names for versions (stable, canary) that requests may give instead of numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from headrace.errors import FailedPrecondition


class Labels:
    """Owns which version each label of one model names.

    A label is moved by configuration or by an operator; whoever spoke last counts. It only ever names a version that is live: until
    the new one is, it stays where it is.
    """

    def __init__(self) -> None:
        self.current: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self._configured: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Labels({self.current}, wanted={self._wanted})"

    def configure(self, labels: Mapping[str, int]) -> None:
        """What configuration and source say now. Of what they said before only the changes count, so that an operator's moves stay."""
        for label in {*labels, *self._configured}:
            if labels.get(label) != self._configured.get(label):
                if label in labels:
                    self._wanted[label] = labels[label]
                else:
                    self._wanted.pop(label, None)
        self._configured = dict(labels)

    def remember(self, labels: Mapping[str, int]) -> None:
        """Where operators had moved labels before this server started. What configuration says of a label comes after it."""
        self._wanted.update(labels)

    @property
    def moved(self) -> dict[str, int]:
        """Where operators moved labels, other than configuration says."""
        return {label: version for label, version in self._wanted.items() if self._configured.get(label) != version}

    @property
    def versions(self) -> set[int]:
        """Those that must be kept, or be loaded, for the labels' sake."""
        return {*self.current.values(), *self._wanted.values()}

    def move(self, label: str, version: int, live: Collection[int]) -> None:
        """By an operator, 0: away. Raises FailedPrecondition where the version is not live."""
        if not version:
            self._wanted.pop(label, None)
        elif version in live:
            self._wanted[label] = version
        else:
            there = ", ".join(map(str, sorted(live))) or "none"
            raise FailedPrecondition(f"label '{label}': expected a live version, got {version}; live: {there}")

    def settle(self, live: Collection[int]) -> list[tuple[str, int, int]]:
        """Move what can be moved. (label, from, to) of each move; 0 stands for nowhere."""
        moves = []
        for label in sorted({*self.current, *self._wanted}):
            before = self.current.get(label, 0)
            after = self._wanted.get(label, 0)
            if after and after not in live:
                after = before if before in live else 0
            if after != before:
                moves.append((label, before, after))
                if after:
                    self.current[label] = after
                else:
                    del self.current[label]
        return moves
