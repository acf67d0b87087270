from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from headrace.errors import LoadError
from headrace.signature import DataType, TensorSpec
from headrace.sources.manifest import (
    FileEntry,
    Manifest,
    ModelTensors,
    decode_manifest,
    encode_manifest,
    read_manifest,
    verify_files,
    write_manifest,
)

FILES = {"model.onnx": b"weights" * 1000, "assets/labels.txt": b"cat\ndog\n"}


def entry(content: bytes) -> FileEntry:
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def manifest() -> Manifest:
    return Manifest("digits", 3, "2025-01-02T03:04:05+00:00", {path: entry(content) for path, content in FILES.items()})


@pytest.fixture
def version(tmp_path: Path) -> Path:
    directory = tmp_path / "digits" / "3"
    for path, content in FILES.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    write_manifest(directory, manifest())
    return directory


# -- to and from bytes -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_everything_in_it(tmp_path: Path) -> None:
    tensors = ModelTensors((TensorSpec("x", DataType.FP32, (-1, 8), optional=True),), (TensorSpec("y", DataType.BYTES, ()),))
    whole = Manifest("größe", 3, "2025-01-02T03:04:05+00:00", manifest().files, tensors, 2, "ab" * 20, {"team": "vision"})
    raw = write_manifest(tmp_path, whole)
    assert read_manifest(tmp_path) == whole
    assert (tmp_path / "manifest.json").read_bytes() == raw


def test_only_what_is_needed_to_verify_must_be_there() -> None:
    text = f'{{"format_version": 1, "model": "m", "version": 1, "files": {{"a": {{"sha256": "{"0" * 64}", "size": 0}}}}, "later": 1}}'
    assert decode_manifest(text.encode(), "m/1/manifest.json") == Manifest("m", 1, "", {"a": FileEntry("0" * 64, 0)})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format_version": 1', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model": "a", "model": "b"}', "key 'model' is there twice"),
        (b"[]", "expected a JSON object, got []"),
        (b"{}", "expected key 'format_version'"),
        (b'{"format_version": 2}', "format_version: expected 1, got 2"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_place(raw: bytes, message: str) -> None:
    with pytest.raises(LoadError) as caught:
        decode_manifest(raw, "digits/3/manifest.json")
    assert str(caught.value).startswith("digits/3/manifest.json: ")
    assert message in str(caught.value)


GOOD = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 7}, "model: expected a string, got 7"),
        ({"model": "\ud800"}, "model: expected valid Unicode"),
        ({"version": "3"}, 'version: expected a whole number, got "3"'),
        ({"version": True}, "version: expected a whole number, got true"),
        ({"version": -1}, "version: expected at least 0, got -1"),
        ({"files": []}, "files: expected an object, got []"),
        ({"files": {}}, "files: expected at least one file"),
        ({"files": {"a": 1}}, "files: 'a': expected an object, got 1"),
        ({"files": {"a": {"size": 1}}}, "files: 'a': expected key 'sha256'"),
        ({"files": {"a": {**GOOD, "sha256": "0" * 63 + "G"}}}, "files: 'a': sha256: expected 64 hexadecimal digits"),
        ({"files": {"a": {**GOOD, "size": 1.5}}}, "files: 'a': size: expected a whole number, got 1.5"),
        ({"signature": {"inputs": []}}, "signature: expected key 'outputs'"),
        (
            {"signature": {"inputs": [{"name": "x", "datatype": "FP33", "shape": []}], "outputs": []}},
            "inputs: datatype: expected one",
        ),
        ({"signature": {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["N"]}], "outputs": []}}, "inputs: shape: expected a whole"),
        ({"parent_version": "2"}, "parent_version: expected a whole number"),
        ({"metadata": {"a": 1}}, "metadata: a: expected a string, got 1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(change: dict[str, Any], message: str) -> None:
    table = {**json.loads(encode_manifest(manifest())), **change}
    with pytest.raises(LoadError) as caught:
        decode_manifest(json.dumps(table).encode(), "digits/3/manifest.json")
    assert f"digits/3/manifest.json: {message}" in str(caught.value) or f"signature: {message}" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "../2/model.onnx", "a/../../b", "./a", "a//b", "a/", "a\0b", "manifest.json", "manifest.json.sig"]
)
def test_a_path_that_leaves_the_directory_is_refused_before_any_file_is_opened(path: str) -> None:
    table = {**json.loads(encode_manifest(manifest())), "files": {path: GOOD}}
    with pytest.raises(LoadError, match="expected paths inside the version directory"):
        decode_manifest(json.dumps(table).encode(), "digits/3/manifest.json")


# -- verification ------------------------------------------------------------------------------------------------------


def test_a_version_as_it_was_published_is_verified_with_its_manifest_signature_and_empty_directories(version: Path) -> None:
    (version / "manifest.json.sig").write_bytes(b"signature")
    (version / "empty").mkdir()
    verify_files(version, read_manifest(version))


def flip_a_bit(directory: Path) -> None:
    (directory / "model.onnx").write_bytes(b"Weights" + FILES["model.onnx"][7:])


def put_a_link(directory: Path) -> None:
    (directory / "model.onnx").rename(directory.parent / "elsewhere")
    (directory / "model.onnx").symlink_to("../elsewhere")


def put_a_pipe(directory: Path) -> None:
    (directory / "model.onnx").unlink()
    os.mkfifo(directory / "model.onnx")


def link_a_directory(directory: Path) -> None:
    (directory / "assets").rename(directory.parent / "assets")
    (directory / "assets").symlink_to("../assets")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda d: os.truncate(d / "model.onnx", 6999), "digits/3/model.onnx: expected 7000 bytes as manifest.json says, got 6999"),
        (flip_a_bit, "digits/3/model.onnx: expected sha256 "),
        (lambda d: (d / "model.onnx").unlink(), "digits/3/model.onnx: is in manifest.json but missing"),
        (lambda d: (d / "assets" / "labels.txt").unlink(), "digits/3/assets/labels.txt: is in manifest.json but missing"),
        (lambda d: (d / "assets" / "x.so").touch(), 'digits/3: file "assets/x.so" is not in manifest.json'),
        (lambda d: (d / ".hidden").touch(), 'digits/3: file ".hidden" is not in manifest.json'),
        (lambda d: (d / "assets" / "manifest.json").touch(), 'digits/3: file "assets/manifest.json" is not in manifest.json'),
        (put_a_link, "digits/3/model.onnx: expected a plain file, got a symbolic link"),
        (put_a_pipe, "digits/3/model.onnx: expected a plain file, got a special file"),
        (link_a_directory, 'digits/3: file "assets" is not in manifest.json'),
    ],
)
def test_the_first_wrong_file_is_named(version: Path, tamper: Callable[[Path], object], message: str) -> None:
    tamper(version)
    with pytest.raises(LoadError) as caught:
        verify_files(version, read_manifest(version))
    assert str(caught.value).startswith(message)


def test_a_large_file_is_hashed_in_parts(version: Path) -> None:
    content = os.urandom(1 << 20) * 2 + b"tail"
    (version / "model.onnx").write_bytes(content)
    verify_files(version, Manifest("digits", 3, "", {**manifest().files, "model.onnx": entry(content)}))


def test_a_directory_that_is_gone_is_this_versions_failure(version: Path) -> None:
    with pytest.raises(LoadError, match="digits/4: cannot be verified: No such file"):
        verify_files(version.parent / "4", manifest())


def test_a_manifest_that_is_a_link_or_without_bounds_is_refused(version: Path) -> None:
    os.truncate(version / "manifest.json", 1 << 30)
    with pytest.raises(LoadError, match="expected at most 16777216 bytes"):
        read_manifest(version)
    (version / "manifest.json").unlink()
    (version / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(LoadError, match=r"digits/3/manifest\.json: cannot be read"):
        read_manifest(version)
