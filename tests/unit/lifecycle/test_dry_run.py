from __future__ import annotations

from typing import Any

from headrace.config import ModelConfig
from headrace.lifecycle.dry_run import NOTHING, plan
from headrace.sources.base import Listing, ModelRef, VersionRef


def listing(versions: dict[int, str], **config: Any) -> Listing:
    """Token by version."""
    refs = {number: VersionRef(token, f"models/m/{number}") for number, token in versions.items()}
    return Listing({"m": ModelRef("m", ModelConfig("m", **config), refs)})


def test_at_first_everything_that_is_selected_is_loaded() -> None:
    assert plan(NOTHING, listing({1: "a", 2: "a"}, labels={"stable": 1})) == [
        "load m:1, from models/m/1",
        "load m:2, from models/m/2",
        "label m@stable: none -> 1",
    ]


def test_changes_are_said_and_nothing_else() -> None:
    before = listing({1: "a"})
    assert plan(before, before) == []
    assert plan(before, listing({1: "a", 2: "a"})) == ["load m:2, from models/m/2", "unload m:1"]
    assert plan(before, listing({1: "b"})) == ["load m:1 again, as its content has changed, from models/m/1"]
    assert plan(before, NOTHING) == ["unload m:1"]
    assert plan(before, listing({1: "a"}, version_policy="7")) == [
        "unload m:1",
        "serve nothing of m: version_policy '7' selects none of 1",
    ]


def test_an_error_unloads_nothing() -> None:
    assert plan(listing({1: "a"}), Listing({}, {"m": "not valid TOML"})) == ["cannot take m: not valid TOML"]
