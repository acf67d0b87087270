import os
from collections.abc import Callable
from pathlib import Path

import pytest
from headrace.config import ModelConfig
from headrace.errors import LoadError
from headrace.plugins import load_backends
from headrace.sources.verification import verify_version

from loadtests.bad_publications import (
    CASES,
    Case,
    is_listed,
    is_logged,
    lay_out,
    make_key,
    reason_in_index,
    with_other_input,
)
from loadtests.models import make_mlp
from loadtests.publisher import Publisher

CHECKED = {"truncated file", "wrong digest", "file not in the manifest"}


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in CHECKED], ids=lambda case: case.kind)
def test_a_spoilt_version_is_refused_for_the_reason_that_the_case_waits_for(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(make_mlp().SerializeToString())
    publisher = Publisher(tmp_path / "models", tmp_path / "staging", "plain", [tmp_path / "model.onnx"], load_backends())
    staged = publisher.stage(1)
    verify_version(ModelConfig("plain"), staged.parent, staged)
    case.spoil(staged)
    with pytest.raises(LoadError, match=case.reason):
        verify_version(ModelConfig("plain"), staged.parent, staged)


def test_a_version_signed_by_a_stranger_is_refused(tmp_path: Path) -> None:
    publishers, _, keys = lay_out(tmp_path)
    make_key(tmp_path / "theirs.pem")
    config = ModelConfig("signed", signature_policy="require", signature_key="public.pem")
    directory = tmp_path / "models" / "signed"
    publishers["signed"].stage(2, keys["signed"])
    publishers["signed"].commit(2)
    verify_version(config, directory, directory / "2")
    publishers["signed"].stage(3, tmp_path / "theirs.pem")
    publishers["signed"].commit(3)
    with pytest.raises(LoadError, match="signature"):
        verify_version(config, directory, directory / "3")


def unreadable() -> Callable[[Path], None]:
    return next(case.spoil for case in CASES if case.kind == "unreadable directory")


def test_an_unreadable_version_cannot_be_read_by_root_either(tmp_path: Path) -> None:
    for name in ("manifest.json", "model.onnx"):
        (tmp_path / name).write_bytes(b"x")
    unreadable()(tmp_path)
    try:
        with pytest.raises(OSError):  # a link to itself for root, no permission for others
            (tmp_path / "model.onnx").read_bytes()
    finally:
        os.chmod(tmp_path, 0o755)


def test_a_reason_is_that_of_the_version_or_of_its_model() -> None:
    rows = [("m", "1", ""), ("m", "2", "2 is broken"), ("n", "", "n cannot be read")]
    assert reason_in_index(rows, "m", 2, "broken") == "2 is broken"
    assert reason_in_index(rows, "m", 3, "broken") == ""
    assert reason_in_index(rows, "m", 0, "broken") == "2 is broken"
    assert reason_in_index(rows, "n", 3, "read") == "n cannot be read"
    assert reason_in_index(rows, "m", 2, "sha256") == ""


def test_a_log_line_gives_the_reason_without_whose_it_is() -> None:
    lines = ["not JSON", "3", '{"event": "live"}', '{"event": "source not readable", "reason": "it is empty"}']
    assert is_logged(lines, "its source cannot be read now: it is empty")
    assert not is_logged(lines, "another")
    assert not is_logged([], "it is empty")


def test_a_reason_is_found_anywhere_in_a_list() -> None:
    table = {"models": [{"name": "m", "versions": [{"reason": "expected 5 bytes, got 4"}]}]}
    assert is_listed(table, "expected 5 bytes, got 4")
    assert not is_listed(table, "expected sha256")
    assert not is_listed({"models": [{"name": "m", "reason": ""}]}, "m: expected 5 bytes")


def test_the_other_signature_is_another_input() -> None:
    assert [tensor.name for tensor in with_other_input().graph.input] == ["z"]
