"""Which versions should be live, and what to do next to get there. Pure functions of what is known.

A driver asks `next_step` after every change and does what it says until it says nothing: there is no plan that could go stale.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from headrace.errors import ConfigError
from headrace.lifecycle.state import ARRIVING, VersionState


class Key(NamedTuple):
    """A version's number and its content's token: a number whose content was replaced is another version."""

    number: int
    token: str


def select_versions(available: Collection[int], policy: str) -> list[int]:
    """The versions that a policy wants, ascending: 'latest:N', 'all', or numbers separated by commas (those that exist).

    Raises ConfigError for a policy of any other form.
    """
    if policy == "all":
        return sorted(available)
    kind, _, count = policy.partition(":")
    if kind == "latest" and _is_number(count) and int(count) > 0:
        return sorted(available)[-int(count) :]
    numbers = [part.strip() for part in policy.split(",")]
    if all(_is_number(number) for number in numbers):
        return sorted({int(number) for number in numbers} & set(available))
    raise ConfigError(f"version_policy: expected 'latest:N', 'all' or version numbers such as '1,3', got {policy!r}")


def _is_number(text: str) -> bool:
    """str.isdigit alone is true of '²', which int() refuses."""
    return text.isascii() and text.isdigit() and len(text) <= 19


def wanted_versions(
    offered: Mapping[int, str],
    policy: str,
    *,
    blocked: AbstractSet[Key] = frozenset(),
    failed: AbstractSet[Key] = frozenset(),
    labelled: Iterable[int] = (),
    serving: Key | None = None,
) -> set[Key]:
    """What should be live of the `offered` versions (token by number).

    A blocked version, one that was rolled back, counts as not there. Labels keep their versions. While everything that the policy
    selects has failed, what serves goes on serving; where nothing does, the newest that has not failed takes its place: a bad
    publication must not take a model down, nor keep it down when the server starts anew.
    """
    there = {Key(number, token) for number, token in offered.items()} - blocked
    by_number = {key.number: key for key in there}
    selected = {by_number[number] for number in select_versions(by_number, policy)}
    wanted = selected | {by_number[number] for number in labelled if number in by_number}
    if offered and selected <= failed:
        if serving is not None:
            wanted.add(serving)
        elif policy.startswith("latest:"):
            # Those that failed stay until their retry; forgotten, they would look like new ones and be tried again at once.
            wanted |= there & failed
            wanted |= {max(there - failed)} if there - failed else set()
    return wanted


class SwapPolicy(enum.Enum):
    """AVAILABILITY: the new version is loaded before the old one is unloaded. RESOURCE: the old one makes room first."""

    AVAILABILITY = "availability"
    RESOURCE = "resource"


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version that exists. `is_prepared`: fetched and verified, waiting in VERIFYING for leave to load. `is_offered`: its source
    still has it, and it was not rolled back."""

    key: Key
    state: VersionState
    is_prepared: bool = False
    is_offered: bool = True


class Action(enum.Enum):
    START = "start"
    LOAD = "load"
    UNLOAD = "unload"


class Step(NamedTuple):
    action: Action
    key: Key


_GONE = frozenset({VersionState.UNLOADED})
_LEAVING = frozenset({VersionState.DRAINING, VersionState.UNLOADING})


def next_step(wanted: AbstractSet[Key], versions: Sequence[VersionStatus], policy: SwapPolicy, serving: Key | None = None) -> Step | None:
    """At most one step towards the wanted versions; None: wait for something to change.

    1. What is not wanted and not live goes at once: a failure is forgotten, a load cancelled. But the oldest load that has only been
       overtaken by a newer version goes on: where versions are published faster than they load, none would ever arrive.
    2. What is wanted and not there is fetched and verified, the newest first; that takes next to no memory.
    3. Live versions that are not wanted go when nothing is wanted; when every wanted one is live; or, when there are several, but
       for the one that serves.
    4. RESOURCE: they also go, all of them, once a wanted version is verified; nothing is loaded until they have gone.
    5. What is wanted, or goes on, and is verified is loaded.
    """
    present = [version for version in versions if version.state not in _GONE]
    stale = [version for version in present if version.key not in wanted]
    overtaken = [v.key for v in stale if v.is_offered and v.state in ARRIVING] if policy is SwapPolicy.AVAILABILITY and wanted else []
    goes_on = set(sorted(overtaken)[:1])
    for version in stale:
        if version.key not in goes_on and version.state is not VersionState.LIVE and version.state not in _LEAVING:
            return Step(Action.UNLOAD, version.key)
    missing = wanted - {version.key for version in present}
    if missing:
        return Step(Action.START, max(missing))
    prepared = [version.key for version in present if version.is_prepared and version.state is VersionState.VERIFYING]
    prepared = sorted((key for key in prepared if key in wanted or key in goes_on), reverse=True)
    leavers = sorted((v.key for v in stale if v.state is VersionState.LIVE), key=lambda key: (key == serving, key))
    if leavers and _may_leave(wanted, present, leavers, makes_room=policy is SwapPolicy.RESOURCE and bool(prepared)):
        return Step(Action.UNLOAD, leavers[0])
    if prepared and not (policy is SwapPolicy.RESOURCE and stale):
        return Step(Action.LOAD, prepared[0])
    return None


def _may_leave(wanted: AbstractSet[Key], present: Sequence[VersionStatus], leavers: Sequence[Key], *, makes_room: bool) -> bool:
    if not wanted or makes_room or len(leavers) > 1:
        return True
    return all(version.state is VersionState.LIVE for version in present if version.key in wanted)


class Preference(NamedTuple):
    """A version that was promoted though a newer one was there: it holds until one comes that is newer than `known`."""

    key: Key
    known: int


class Choice(NamedTuple):
    """Who gets requests that name no version, None: nobody. `is_tried`: it has to pass a trial beside the one that gets them now."""

    key: Key | None
    is_tried: bool = False


def newest_selected(live: AbstractSet[Key], selected: AbstractSet[Key], preference: Preference | None) -> Key | None:
    chosen = live & selected
    newest = max(chosen, default=None)
    if newest is not None and preference is not None and preference.key in live and newest.number <= preference.known:
        return preference.key
    return newest


def choose_serving(
    live: AbstractSet[Key],
    selected: AbstractSet[Key],
    current: Key | None,
    *,
    preference: Preference | None = None,
    offered: AbstractSet[Key] = frozenset(),
    blocked: AbstractSet[Key] = frozenset(),
    has_trials: bool = False,
) -> Choice:
    """1. The newest live version that the policy selects; on trial where versions are, but going back is never on trial. 2. One that
    is newer than what serves, though overtaken before it was live. 3. What served so far. 4. The newest that is live."""
    current = current if current in live else None
    target = newest_selected(live, selected, preference)
    if target is not None:
        is_new = current is not None and target != current and target.number >= current.number and current not in blocked
        return Choice(target, has_trials and is_new)
    if current is not None and not has_trials:
        return Choice(max([key for key in (live & offered) - blocked if key.number > current.number], default=current))
    return Choice(current or max(live, default=None))


def swap_policy(configured: str, needed: int, available: int) -> SwapPolicy:
    """`configured`: model.toml's swap_policy; `auto` makes room only where the new version would not fit beside the old one.

    Bytes. A tenth of what is available is left to the batches: the estimate covers weights, not activations.
    """
    if configured == "auto":
        return SwapPolicy.AVAILABILITY if needed <= 0.9 * available else SwapPolicy.RESOURCE
    return SwapPolicy(configured)


FIRST_RETRY = 30.0
LONGEST_RETRY = 15 * 60.0


def retry_delay(failures: int) -> float:
    """Seconds until a version that has failed so many times is tried again: what was wrong may have been the store's."""
    return min(FIRST_RETRY * 2.0 ** (failures - 1), LONGEST_RETRY)
