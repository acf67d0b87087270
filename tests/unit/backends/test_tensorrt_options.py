from __future__ import annotations

import pytest
from headrace.backends.tensorrt_options import BuildOptions, Options, parse_options
from headrace.errors import LoadError


def test_nothing_given_is_the_defaults_and_trusts_no_plan() -> None:
    assert parse_options({}) == Options()
    assert not Options().trust_plans


def test_options_are_taken_by_name() -> None:
    options = parse_options({"trust_plans": "true", "optimization_level": "5", "tf32": "false", "profile.x": "1;2;3", "cache_mb": "7"})
    assert options == Options(
        trust_plans=True, cache_mb=7, build=BuildOptions(optimization_level=5, tf32=False), profiles={"profile.x": "1;2;3"}
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("optimization_level", "6", "a whole number from 0 to 5, got '6'"),
        ("optimization_level", "high", "a whole number from 0 to 5, got 'high'"),
        ("workspace_mb", "0", "a whole number from 1, got '0'"),
        ("refit", "yes", "true or false, got 'yes'"),
        ("hardware_compatibility", "all", "one of none, ampere_plus, got 'all'"),
    ],
)
def test_value_that_does_not_fit_is_refused(name: str, value: str, reason: str) -> None:
    with pytest.raises(LoadError, match=f"tensorrt option '{name}': expected {reason}"):
        parse_options({name: value})


def test_mistyped_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(LoadError, match="unknown tensorrt option 'trust_plan', did you mean 'trust_plans'"):
        parse_options({"trust_plan": "true"})
    with pytest.raises(LoadError, match=r"unknown tensorrt option 'zzz', known: .*refit.*profile\.INPUT"):
        parse_options({"zzz": "1"})
