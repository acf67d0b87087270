from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from headrace.config import SourceConfig
from headrace.errors import ConfigError, LoadError
from headrace.sources import directory as module
from headrace.sources.base import Listing, is_version_name
from headrace.sources.directory import DirectorySource
from structlog.testing import CapturingLogger


def add(directory: Path, content: str = "weights") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.onnx").write_text(content, encoding="utf-8")
    return directory


def listing(root: Path | str) -> Listing:
    async def read() -> Listing:
        return await DirectorySource(str(root), SourceConfig()).list()

    return asyncio.run(read())


def token(root: Path) -> str:
    return listing(root).models["m"].versions[1].token


def test_models_and_their_versions(tmp_path: Path) -> None:
    for path in ("a/1", "a/2", "a/10", "b/7"):
        add(tmp_path / path)
    found = listing(tmp_path)
    assert {name: sorted(model.versions) for name, model in found.models.items()} == {"a": [1, 2, 10], "b": [7]}
    assert found.models["a"].versions[10].location == str(tmp_path / "a" / "10")
    assert found.models["a"].config.version_policy == "latest:1"
    assert found.errors == {}


def test_root_can_be_a_single_model(tmp_path: Path) -> None:
    add(tmp_path / "resnet" / "1")
    add(tmp_path / "resnet" / "2")
    found = listing(tmp_path / "resnet")
    assert {name: sorted(model.versions) for name, model in found.models.items()} == {"resnet": [1, 2]}


def test_single_model_given_as_the_present_directory_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "resnet" / "1")
    monkeypatch.chdir(tmp_path / "resnet")
    assert list(listing(Path()).models) == ["resnet"]


def test_linked_model_is_called_as_the_link(tmp_path: Path) -> None:
    add(tmp_path / "store" / "ab12cd" / "1")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet").symlink_to(tmp_path / "store" / "ab12cd")
    assert list(listing(tmp_path / "models").models) == ["resnet"]


def test_uri_with_a_scheme(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    assert list(listing(f"file://{tmp_path}").models) == ["m"]


@pytest.mark.parametrize("name", [".staging", "_tmp", "..data", ".git"])
def test_hidden_names_are_neither_models_nor_versions(name: str, tmp_path: Path) -> None:
    add(tmp_path / name / "1")
    add(tmp_path / "m" / "1")
    add(tmp_path / "m" / name)
    assert {m.name: sorted(m.versions) for m in listing(tmp_path).models.values()} == {"m": [1]}


@pytest.mark.parametrize(
    ("name", "is_version"),
    [("1", True), ("20", True), ("01", False), ("v1", False), ("1.0", False), ("²", False), (str(2**63 - 1), True), (str(2**63), False)],
)
def test_version_names_are_whole_numbers_without_leading_zeros(name: str, is_version: bool) -> None:
    assert is_version_name(name) is is_version


def test_odd_directories_are_ignored_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(module, "log", log)
    for path in ("m/1", "m/02", "m/warmup"):
        add(tmp_path / path)

    async def read() -> list[Listing]:
        source = DirectorySource(str(tmp_path), SourceConfig())
        return [await source.list() for _ in range(3)]

    listings = asyncio.run(read())

    assert [sorted(found.models["m"].versions) for found in listings] == [[1]] * 3
    assert [(call.method_name, call.args[0], call.kwargs["directory"]) for call in log.calls] == [("warning", "directory ignored", "02")]


def test_files_beside_models_and_versions_are_no_matter(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    (tmp_path / "README.md").touch()
    (tmp_path / "m" / "2").touch()
    assert sorted(listing(tmp_path).models["m"].versions) == [1]


def test_policy_comes_from_the_models_configuration(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text('version_policy = "all"', encoding="utf-8")
    assert listing(tmp_path).models["m"].config.version_policy == "all"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("nonsense = 1", "unknown key 'nonsense'"),
        ("= =", "not valid TOML"),
        ('version_policy = "newest"', "expected 'latest:N'"),
    ],
)
def test_one_broken_model_is_an_error_beside_the_others(toml: str, message: str, tmp_path: Path) -> None:
    add(tmp_path / "good" / "1")
    add(tmp_path / "bad" / "1")
    (tmp_path / "bad" / "model.toml").write_text(toml, encoding="utf-8")
    found = listing(tmp_path)
    assert list(found.models) == ["good"]
    assert list(found.errors) == ["bad"]
    assert message in found.errors["bad"]


def test_model_without_a_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert listing(tmp_path).errors == {"m": "model 'm' has no version: expected a directory such as m/1 with a model file in it"}


async def test_a_version_that_cannot_be_read_fails_when_it_is_fetched_and_holds_up_no_other(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    (add(tmp_path / "m" / "2") / "weights.data").symlink_to(tmp_path / "gone")
    source = DirectorySource(str(tmp_path), SourceConfig())
    found = await source.list()
    assert (found.errors, sorted(found.models["m"].versions)) == ({}, [1, 2])
    await source.fetch(found.models["m"], 1)
    with pytest.raises(LoadError, match=r"m/2 cannot be read: No such file or directory: weights\.data"):
        await source.fetch(found.models["m"], 2)


@pytest.mark.parametrize(("name", "found"), [("missing", "nothing"), ("file", "a file")])
def test_missing_root_is_named(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"model repository '.*/{name}': expected a directory, found {found}"):
        listing(tmp_path / name)


def test_empty_repository_is_an_empty_listing(tmp_path: Path) -> None:
    assert listing(tmp_path) == Listing({}, {})


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_token_stays_while_nothing_changes(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    assert token(tmp_path) == token(tmp_path)


def test_token_changes_with_content_of_equal_size_and_time(tmp_path: Path) -> None:
    """As `mv` of a new file over the old one does it: only the inode differs."""
    path = add(tmp_path / "m" / "1") / "model.onnx"
    before, times = token(tmp_path), path.stat()
    fresh = path.with_name("fresh")
    fresh.write_text("WEIGHTS", encoding="utf-8")
    os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh.replace(path)
    assert token(tmp_path) != before


@pytest.mark.parametrize("name", ["1/model.onnx.data", "1/sub/deep", "labels.txt"])
def test_token_changes_with_files_of_the_version_and_of_the_model(name: str, tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    tokens = [token(tmp_path)]
    path = tmp_path / "m" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    tokens.append(token(tmp_path))
    path.write_text("max_batch_size = 4", encoding="utf-8")
    tokens.append(token(tmp_path))
    path.unlink()
    tokens.append(token(tmp_path))
    assert len(set(tokens[:3])) == 3
    assert tokens[3] != tokens[2]


def test_token_changes_with_what_the_configuration_says_of_serving_and_with_nothing_else_in_it(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    before = token(tmp_path)
    toml = tmp_path / "m" / "model.toml"
    toml.write_text('version_policy = "all"\n[labels]\nstable = 1\n[rollout]\nmode = "canary"', encoding="utf-8")
    assert token(tmp_path) == before
    toml.write_text("max_batch_size = 4", encoding="utf-8")
    assert token(tmp_path) != before


def test_token_is_not_touched_by_other_versions(tmp_path: Path) -> None:
    add(tmp_path / "m" / "1")
    before = token(tmp_path)
    add(tmp_path / "m" / "2")
    assert token(tmp_path) == before


def test_file_system_is_never_read_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "m" / "1")
    threads = []
    read = module.load_model_config
    monkeypatch.setattr(module, "load_model_config", lambda *given: (threads.append(threading.current_thread()), read(*given))[1])
    listing(tmp_path)
    assert threads
    assert threading.main_thread() not in threads
