from __future__ import annotations

import json
from dataclasses import replace

import pytest
from headrace.errors import LoadError
from headrace.sources.manifest import FileEntry
from headrace.sources.object_store_client import public_uri
from headrace.sources.object_store_index import (
    StoredFile,
    StoredModel,
    StoredVersion,
    decode_index,
    encode_index,
    group_objects,
    version_token,
)

MODELS = {
    "digits": StoredModel(
        {1: StoredVersion(FileEntry("a" * 64, 812)), 10: StoredVersion(None, {"dir/w.bin": StoredFile('"e1"', 9)})},
        {"model.toml": StoredFile('"e2"', 57, "b" * 64)},
    ),
    "ü b": StoredModel({0: StoredVersion(FileEntry("c" * 64, 1))}),
}


def test_an_index_is_read_as_it_was_written() -> None:
    assert decode_index(encode_index(MODELS)) == MODELS


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, got []"),
        (b'{"format_version": 2, "models": {}}', "format_version: expected 1, got 2"),
        (b'{"format_version": 1}', "models: expected an object, got null"),
        (b'{"format_version": 1, "models": {"m": {"versions": {"01": {}}, "files": {}}}}', "'m': versions: expected numbers, got '01'"),
        (
            b'{"format_version": 1, "models": {"m": {"versions": {"1": {"manifest": {"sha256": 3}}}, "files": {}}}}',
            "sha256: expected a string",
        ),
        (
            b'{"format_version": 1, "models": {"m": {"versions": {"1": {"files": {"f": {"etag": "x"}}}}, "files": {}}}}',
            "size: expected a whole",
        ),
    ],
)
def test_an_index_that_cannot_be_read_is_refused_with_the_key(raw: bytes, text: str) -> None:
    with pytest.raises(LoadError) as caught:
        decode_index(raw)
    assert text in str(caught.value)
    assert str(caught.value).startswith("headrace-index.json: ")


def test_keys_of_later_versions_are_left_alone() -> None:
    table = json.loads(encode_index(MODELS)) | {"published": "today"}
    assert decode_index(json.dumps(table).encode()) == MODELS


def test_objects_are_grouped_and_hidden_and_claimed_ones_are_nothing() -> None:
    file = StoredFile("e", 1, changed_at=5.0)
    names = [
        "m/1/f",
        "m/1/d/g",
        "m/labels",
        "m/01/f",
        "m/2/",
        "m/3/f",
        "m/.claim-3",
        "m/.x",
        "_m/1/f",
        ".m/1/f",
        "7/1/f",
        "top",
        "bare/labels",
    ]
    assert group_objects((name, file) for name in names) == {
        "m": StoredModel({1: StoredVersion(None, {"f": file, "d/g": file})}, {"labels": file})
    }


def test_a_token_changes_with_content_configuration_and_files_beside_but_not_with_how_it_was_found() -> None:
    version, beside = MODELS["digits"].versions[1], {"labels": StoredFile("e", 1), "model.toml": StoredFile("t", 1)}
    token = version_token(version, "cfg", beside)
    assert token == version_token(replace(version, files={"model.onnx": StoredFile("e", 4)}), "cfg", beside)
    assert token == version_token(version, "cfg", {**beside, "model.toml": StoredFile("u", 2)}), "the configuration counts by what it says"
    others = [
        version_token(StoredVersion(FileEntry("d" * 64, 812)), "cfg", beside),
        version_token(version, "other", beside),
        version_token(version, "cfg", {"labels": StoredFile("f", 1)}),
        version_token(MODELS["digits"].versions[10], "cfg", beside),
    ]
    assert len({token, *others}) == 5


def test_what_is_said_of_a_uri_has_no_password_in_it() -> None:
    assert public_uri("https://user:pw@host/models?sig=abc#x") == "https://host/models"
    assert public_uri("abfs://container@account.dfs.core.windows.net/x") == "abfs://container@account.dfs.core.windows.net/x"
