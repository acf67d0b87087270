"""The states of one model version and the moves between them, as data."""

from __future__ import annotations

import enum


class VersionState(enum.Enum):
    DISCOVERED = "discovered"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    LOADING = "loading"
    WARMING = "warming"
    LIVE = "live"
    DRAINING = "draining"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"
    FAILED = "failed"


ARRIVING = frozenset({VersionState.DISCOVERED, VersionState.FETCHING, VersionState.VERIFYING, VersionState.LOADING, VersionState.WARMING})
"""On the way to serving: a newer wanted version may still overtake it."""


_S = VersionState

MOVES: dict[VersionState, frozenset[VersionState]] = {
    _S.DISCOVERED: frozenset({_S.FETCHING, _S.FAILED, _S.UNLOADING}),
    _S.FETCHING: frozenset({_S.VERIFYING, _S.FAILED, _S.UNLOADING}),
    _S.VERIFYING: frozenset({_S.LOADING, _S.FAILED, _S.UNLOADING}),
    _S.LOADING: frozenset({_S.WARMING, _S.FAILED, _S.UNLOADING}),
    _S.WARMING: frozenset({_S.LIVE, _S.FAILED, _S.UNLOADING}),
    _S.LIVE: frozenset({_S.DRAINING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.UNLOADING}),
    _S.UNLOADING: frozenset({_S.UNLOADED}),
    _S.UNLOADED: frozenset(),
    _S.FAILED: frozenset({_S.UNLOADED}),
}
"""A version that failed or was unloaded is not revived: a retry is a new version object with fresh counters."""

INDEX_STATES: dict[VersionState, str] = {
    _S.DISCOVERED: "LOADING",
    _S.FETCHING: "LOADING",
    _S.VERIFYING: "LOADING",
    _S.LOADING: "LOADING",
    _S.WARMING: "LOADING",
    _S.LIVE: "READY",
    _S.DRAINING: "UNLOADING",
    _S.UNLOADING: "UNLOADING",
    _S.UNLOADED: "UNAVAILABLE",
    _S.FAILED: "UNAVAILABLE",
}
"""The published vocabulary: what RepositoryIndex says (Triton's words)."""


def check_move(current: VersionState, new: VersionState) -> None:
    if new not in MOVES[current]:
        raise AssertionError(f"illegal move from {current.value} to {new.value}; legal: {sorted(s.value for s in MOVES[current])}")
