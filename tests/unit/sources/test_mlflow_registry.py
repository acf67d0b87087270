from __future__ import annotations

import sys
from typing import Any

import pytest
from headrace.config import SourceConfig
from headrace.errors import ConfigError, LoadError
from headrace.sources.mlflow import MlflowSource, select_ready
from headrace.sources.mlflow_destination import MlflowDestination
from headrace.sources.mlflow_registry import Place, RegisteredVersion, is_mlflow_file, onnx_file, parse_uri, scrub


def version(number: int, status: str = "READY", message: str = "") -> RegisteredVersion:
    return RegisteredVersion(number, status, message, "run", "origin", 1)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("mlflow:digits", Place("digits")),
        ("mlflow:digits/12", Place("digits", version=12)),
        ("mlflow:digits@champion", Place("digits", alias="champion")),
        ("mlflow:main.vision.digits@prod-1", Place("main.vision.digits", alias="prod-1")),
        ("mlflow:my model@a_b", Place("my model", alias="a_b")),
    ],
)
def test_a_uri_names_a_model_and_what_of_it(uri: str, place: Place) -> None:
    assert parse_uri("models", uri) == place


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "@a",
        "/1",
        "digits@",
        "digits/",
        "digits/01",
        "digits/one",
        "digits/1@a",
        "//host/digits",
        "..",
        "../up",
        ".a",
        "_a",
        "a\\b",
        "a?b",
        "a#b",
        " a",
    ],
)
def test_another_uri_is_refused_with_what_was_expected(rest: str) -> None:
    with pytest.raises(ConfigError, match=r"^models: expected mlflow:NAME, mlflow:NAME/VERSION or mlflow:NAME@ALIAS, got "):
        parse_uri("models", f"mlflow:{rest}")


def test_publishing_to_a_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLflow numbers versions itself"):
        MlflowDestination("mlflow:digits/3", SourceConfig())


def test_a_token_is_of_what_never_changes_and_differs_between_versions_and_models_made_anew() -> None:
    first = version(1)
    assert first.digest == version(1, "FAILED_REGISTRATION", "why").digest
    others = [
        version(2),
        RegisteredVersion(1, "READY", "", "run 2", "origin", 1),
        RegisteredVersion(1, "READY", "", "run", "elsewhere", 1),
        RegisteredVersion(1, "READY", "", "run", "origin", 2),
    ]
    assert len({each.digest for each in (first, *others)}) == 5


def test_versions_that_mlflow_has_not_finished_are_passed_over() -> None:
    assert select_ready(Place("m"), [version(1), version(2, "PENDING_REGISTRATION"), version(3)]) == [version(1), version(3)]


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ([], "registered model 'm' has no version"),
        ([version(4, "PENDING_REGISTRATION")], "m/4 is PENDING_REGISTRATION in MLflow, expected READY"),
        ([version(4, "FAILED_REGISTRATION", "no space")], "m/4 is FAILED_REGISTRATION in MLflow, expected READY: no space"),
    ],
)
def test_no_finished_version_is_an_error_with_the_status(versions: list[RegisteredVersion], text: str) -> None:
    with pytest.raises(LoadError) as caught:
        select_ready(Place("m"), versions)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("for url: https://b.s3/x?X-Amz-Signature=abc&y=1 and more", "for url: https://b.s3/x and more"),
        ("API request to http://me:secret@host:5000/api failed", "API request to http://host:5000/api failed"),
        ("two\n lines", "two lines"),
        ("", "ValueError"),
        ("x" * 400, "x" * 300 + "…"),
    ],
)
def test_what_addresses_carry_is_not_shown(text: str, shown: str) -> None:
    assert scrub(ValueError(text)) == shown


@pytest.mark.parametrize(("path", "expected"), [("MLmodel", True), ("metadata/MLmodel", True), ("model.onnx", False), ("a/MLmodel", False)])
def test_mlflows_own_files_are_known(path: str, expected: bool) -> None:
    assert is_mlflow_file(path) is expected


def test_an_mlmodel_names_its_onnx_file() -> None:
    assert onnx_file({"flavors": {"onnx": {"data": "model.onnx"}, "python_function": {}}}, "m") == "model.onnx"


@pytest.mark.parametrize(
    ("mlmodel", "found"),
    [({}, "none"), ({"flavors": None}, "none"), ({"flavors": {"sklearn": {}, "python_function": {}}}, "python_function, sklearn")],
)
def test_another_flavour_is_refused_with_what_was_found(mlmodel: dict[str, Any], found: str) -> None:
    with pytest.raises(LoadError, match=f"^m/MLmodel: expected the flavour onnx with its file, found {found}$"):
        onnx_file(mlmodel, "m")


async def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[mlflow\]'"):
        await MlflowSource("mlflow:digits", SourceConfig()).list()


async def test_without_an_address_nothing_is_made_in_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match="expected the registry's address in MLFLOW_TRACKING_URI"):
        await MlflowSource("mlflow:digits", SourceConfig()).list()
