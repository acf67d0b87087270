from __future__ import annotations

import random

import pytest
from headrace.errors import ConfigError
from headrace.lifecycle.policy import (
    Action,
    Choice,
    Key,
    Preference,
    Step,
    SwapPolicy,
    VersionStatus,
    choose_serving,
    next_step,
    retry_delay,
    select_versions,
    swap_policy,
    wanted_versions,
)
from headrace.lifecycle.state import VersionState as S

AVAILABILITY, RESOURCE = SwapPolicy.AVAILABILITY, SwapPolicy.RESOURCE
AV, RE = AVAILABILITY, RESOURCE
START, LOAD, UNLOAD = Action


def k(number: int, token: str = "a") -> Key:
    return Key(number, token)


def keys(*numbers: int) -> set[Key]:
    return {k(number) for number in numbers}


def has(number: int, state: S, *, prepared: bool = False, token: str = "a", offered: bool = True) -> VersionStatus:
    return VersionStatus(k(number, token), state, prepared, offered)


def ready(number: int) -> VersionStatus:
    return has(number, S.VERIFYING, prepared=True)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("latest:1", [9]),
        ("latest:2", [3, 9]),
        ("latest:7", [1, 3, 9]),
        ("all", [1, 3, 9]),
        ("3", [3]),
        ("9, 1, 5", [1, 9]),
        ("5", []),
    ],
)
def test_versions_selected(policy: str, expected: list[int]) -> None:
    assert select_versions([9, 1, 3], policy) == expected


@pytest.mark.parametrize("policy", ["", "latest", "latest:0", "latest:-1", "newest", "1,,2", "latest:²", "²", "1,²"])
def test_other_policies_are_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="version_policy: expected 'latest:N'"):
        select_versions([1], policy)


OFFERED = {3: "a", 4: "a", 5: "a"}


@pytest.mark.parametrize(
    ("case", "options", "expected"),
    [
        ("the policy decides", {}, [5]),
        ("labels keep their versions", {"labelled": [3, 7]}, [3, 5]),
        ("what was rolled back counts as not there", {"blocked": keys(5)}, [4]),
        ("what serves goes on while the newest has failed", {"failed": keys(5), "serving": k(3)}, [3, 5]),
        ("where nothing serves the newest that did not fail is taken", {"failed": keys(5)}, [4, 5]),
        ("a failure of the fallback goes further back", {"failed": keys(4, 5)}, [3, 4, 5]),
        ("when everything fails all of it waits for its retry", {"failed": keys(3, 4, 5)}, [3, 4, 5]),
        ("when everything was rolled back what serves goes on", {"blocked": keys(3, 4, 5), "serving": k(5)}, [5]),
    ],
)
def test_wanted(case: str, options: dict[str, object], expected: list[int]) -> None:
    assert wanted_versions(OFFERED, "latest:1", **options) == keys(*expected), case  # type: ignore[arg-type]


def test_a_list_of_versions_has_no_fallback() -> None:
    assert wanted_versions(OFFERED, "5", failed=keys(5)) == keys(5)


def test_a_block_ends_with_the_content_that_it_was_for() -> None:
    assert wanted_versions({5: "b"}, "latest:1", blocked=keys(5)) == {k(5, "b")}


def test_what_is_no_longer_offered_is_not_wanted_though_it_serves() -> None:
    assert wanted_versions({}, "latest:1", serving=k(5)) == set()


@pytest.mark.parametrize(
    ("case", "wanted", "versions", "policy", "expected"),
    [
        ("the newest is started first", keys(1, 2), [], AV, (START, k(2))),
        ("then the others", keys(1, 2), [has(2, S.FETCHING)], AV, (START, k(1))),
        ("a verified version is loaded beside the old one", keys(2), [has(1, S.LIVE), ready(2)], AV, (LOAD, k(2))),
        ("not before it is verified", keys(2), [has(1, S.LIVE), has(2, S.VERIFYING)], AV, None),
        ("the old one stays while the new one loads", keys(2), [has(1, S.LIVE), has(2, S.WARMING)], AV, None),
        ("and goes when it is live", keys(2), [has(1, S.LIVE), has(2, S.LIVE)], AV, (UNLOAD, k(1))),
        ("it stays when the new one failed", keys(2), [has(1, S.LIVE), has(2, S.FAILED)], AV, None),
        ("also beside an older wanted one", keys(2, 3), [has(1, S.LIVE), has(2, S.LIVE), has(3, S.FAILED)], AV, None),
        ("and when only an older wanted one is live", keys(1, 3), [has(1, S.LIVE), has(2, S.LIVE), has(3, S.LOADING)], AV, None),
        ("of several old ones the newest stays", keys(4), [has(1, S.LIVE), has(2, S.LIVE), has(4, S.LOADING)], AV, (UNLOAD, k(1))),
        ("nothing wanted: all go", set(), [has(1, S.LIVE)], AV, (UNLOAD, k(1))),
        ("a load that was taken back is cancelled", keys(3), [has(2, S.LOADING, offered=False), has(3, S.FETCHING)], AV, (UNLOAD, k(2))),
        ("one that was overtaken goes on", keys(3), [has(1, S.LIVE), has(2, S.LOADING), has(3, S.FETCHING)], AV, None),
        ("and is given leave to load", keys(3), [has(1, S.LIVE), ready(2), has(3, S.FETCHING)], AV, (LOAD, k(2))),
        ("but only the oldest", keys(4), [has(2, S.LOADING), has(3, S.FETCHING), has(4, S.FETCHING)], AV, (UNLOAD, k(3))),
        ("and not where memory is short", keys(3), [has(2, S.LOADING), has(3, S.FETCHING)], RE, (UNLOAD, k(2))),
        ("nothing wanted: loads are cancelled", set(), [has(2, S.LOADING)], AV, (UNLOAD, k(2))),
        ("a failure that is no longer wanted is forgotten", keys(3), [has(2, S.FAILED), has(3, S.LIVE)], AV, (UNLOAD, k(2))),
        ("one that leaves is left alone", keys(2), [has(1, S.DRAINING), has(2, S.LIVE)], AV, None),
        ("replaced content is another version", {k(1, "b")}, [has(1, S.LIVE)], AV, (START, k(1, "b"))),
        ("resource: the old one makes room", keys(2), [has(1, S.LIVE), ready(2)], RE, (UNLOAD, k(1))),
        ("but not for one that may yet turn out to be bad", keys(2), [has(1, S.LIVE), has(2, S.VERIFYING)], RE, None),
        ("nothing is loaded while it drains", keys(2), [has(1, S.DRAINING), ready(2)], RE, None),
        ("when it has gone the new one is loaded", keys(2), [has(1, S.UNLOADED), ready(2)], RE, (LOAD, k(2))),
        ("resource: a failed new one takes nothing away", keys(2), [has(1, S.LIVE), has(2, S.FAILED)], RE, None),
    ],
)  # fmt: skip
def test_next_step(case: str, wanted: set[Key], versions: list[VersionStatus], policy: SwapPolicy, expected: Step | None) -> None:
    assert next_step(wanted, versions, policy) == expected, case


def test_of_several_that_are_not_wanted_the_one_that_serves_goes_last() -> None:
    versions = [has(1, S.LIVE), has(2, S.LOADING), has(3, S.LIVE)]
    assert next_step(keys(2), versions, AV, serving=k(1)) == (UNLOAD, k(3))
    assert next_step(keys(2), versions, AV, serving=k(3)) == (UNLOAD, k(1))


@pytest.mark.parametrize("policy", list(SwapPolicy))
def test_steps_arrive_at_the_wanted_versions_from_anywhere_and_availability_never_leaves_nothing_live(policy: SwapPolicy) -> None:
    """Random walks: what is wanted changes at any time, loads end well or badly; the seed is in the failure."""
    for seed in range(300):
        dice = random.Random(seed)
        states: dict[Key, VersionStatus] = {}
        wanted = keys(1)
        for _ in range(60):
            if dice.random() < 0.1:
                wanted = keys(*dice.sample(range(1, 6), dice.randint(1, 2)))
            was_live = any(v.state is S.LIVE for v in states.values())
            _advance(states, wanted, policy, dice)
            is_live = any(v.state is S.LIVE for v in states.values())
            assert policy is RESOURCE or is_live or not was_live, seed
        for _ in range(100):
            _advance(states, wanted, policy, dice, may_fail=False)
        assert {key for key, v in states.items() if v.state is S.LIVE} >= {key for key in wanted if states[key].state is not S.FAILED}, seed
        if all(states[key].state is S.LIVE for key in wanted):
            assert {key for key, v in states.items() if v.state is S.LIVE} <= wanted, seed


def _advance(states: dict[Key, VersionStatus], wanted: set[Key], policy: SwapPolicy, dice: random.Random, may_fail: bool = True) -> None:
    step = next_step(wanted, list(states.values()), policy)
    if step is not None:
        if step.action is Action.START:
            assert step.key in wanted
            states[step.key] = VersionStatus(step.key, S.FETCHING)
        elif step.action is Action.LOAD:
            states[step.key] = VersionStatus(step.key, S.LOADING)
        else:
            was_live = states[step.key].state is S.LIVE
            states[step.key] = VersionStatus(step.key, S.DRAINING if was_live else S.UNLOADED)
    moving = [v for v in states.values() if v.state in (S.FETCHING, S.LOADING, S.DRAINING)]
    for version in dice.sample(moving, min(len(moving), 1)):
        failed = may_fail and dice.random() < 0.2
        after = {S.FETCHING: S.VERIFYING, S.LOADING: S.FAILED if failed else S.LIVE, S.DRAINING: S.UNLOADED}[version.state]
        states[version.key] = VersionStatus(version.key, after, is_prepared=after is S.VERIFYING)


@pytest.mark.parametrize(
    ("case", "live", "selected", "current", "options", "expected"),
    [
        ("the newest of the selected", keys(1, 2, 3), keys(1, 2), k(1), {}, Choice(k(2))),
        ("nobody, when nothing is live", set(), keys(1), None, {}, Choice(None)),
        ("the first one is not on trial", keys(1), keys(1), None, {"has_trials": True}, Choice(k(1))),
        ("a newer one is", keys(1, 2), keys(2), k(1), {"has_trials": True}, Choice(k(2), is_tried=True)),
        ("replaced content is", {k(1), k(1, "b")}, {k(1, "b")}, k(1), {"has_trials": True}, Choice(k(1, "b"), is_tried=True)),
        ("going back is not", keys(1, 2), keys(1), k(2), {"has_trials": True}, Choice(k(1))),
        ("nor what follows a rollback", keys(2, 3), keys(3), k(2), {"has_trials": True, "blocked": keys(2)}, Choice(k(3))),
        ("what serves stays while the selected one loads", keys(1), keys(2), k(1), {}, Choice(k(1))),
        ("an overtaken one serves meanwhile", keys(1, 2), keys(3), k(1), {"offered": keys(1, 2, 3)}, Choice(k(2))),
        ("but not without its trial", keys(1, 2), keys(3), k(1), {"offered": keys(1, 2, 3), "has_trials": True}, Choice(k(1))),
        ("nor one that was taken back", keys(1, 2), keys(3), k(1), {"offered": keys(1, 3)}, Choice(k(1))),
        ("nor one that was rolled back", keys(1, 2), set(), k(1), {"offered": keys(1, 2), "blocked": keys(2)}, Choice(k(1))),
        ("when what served has gone the newest does", keys(1, 2), set(), k(3), {}, Choice(k(2))),
        ("an older one that was promoted", keys(1, 2), keys(1, 2), k(2), {"preference": Preference(k(1), 2)}, Choice(k(1))),
        ("until a newer one comes", keys(1, 2, 3), keys(1, 2, 3), k(1), {"preference": Preference(k(1), 2)}, Choice(k(3))),
    ],
)  # fmt: skip
def test_who_serves(
    case: str, live: set[Key], selected: set[Key], current: Key | None, options: dict[str, object], expected: Choice
) -> None:
    assert choose_serving(live, selected, current, **options) == expected, case  # type: ignore[arg-type]


def test_memory_decides_where_nobody_else_has() -> None:
    assert swap_policy("auto", needed=80, available=100) is AVAILABILITY
    assert swap_policy("auto", needed=95, available=100) is RESOURCE
    assert swap_policy("availability", needed=95, available=100) is AVAILABILITY
    assert swap_policy("resource", needed=1, available=100) is RESOURCE


def test_retries_come_less_and_less_often() -> None:
    assert [retry_delay(n) for n in (1, 2, 3)] == [30, 60, 120]
    assert retry_delay(50) == 900
