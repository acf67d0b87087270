from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_models
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat
from headrace import cli
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import SourceConfig
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.reference import FeatureReference, Reference
from headrace.drift.reference_file import encode
from headrace.errors import AlreadyExists, ConfigError, LoadError
from headrace.model_files import load_model_config
from headrace.sources import publish as module
from headrace.sources import verification
from headrace.sources.directory_destination import DirectoryDestination
from headrace.sources.manifest import read_manifest, write_manifest
from headrace.sources.publish import Order, Published, publish
from headrace.sources.verification import Verified, verify_version
from structlog.testing import CapturingLogger

BACKENDS = {"onnxruntime": OnnxRuntimeBackend}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return onnx_models.save(onnx_models.mlp(8, 4), tmp_path / "build", "trained.onnx")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def publish_digits(artifact: Path, repository: Path, **options: Any) -> Published:
    return publish(Order(artifact, "digits", **options), DirectoryDestination(str(repository), SourceConfig()), BACKENDS)


def verify(model_directory: Path, version_directory: Path) -> Verified:
    return verify_version(load_model_config(model_directory, model_directory.name), model_directory, version_directory)


def everything_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# -- what is published -------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_version_with_its_digest_tensors_and_lineage(artifact: Path, repository: Path) -> None:
    publish_digits(artifact, repository)
    published = publish_digits(artifact, repository, metadata={"team": "vision"})
    manifest = read_manifest(repository / "digits" / "2")
    assert manifest == published.manifest
    assert manifest.files["model.onnx"].sha256 == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert manifest.signature is not None
    assert [(s.name, s.datatype.value, s.shape) for s in manifest.signature.inputs] == [("x", "FP32", (-1, 8))]
    assert (manifest.model, manifest.version, manifest.parent_version, manifest.metadata) == ("digits", 2, 1, {"team": "vision"})
    assert everything_in(repository) == ["digits", *(f"digits/{v}{f}" for v in (1, 2) for f in ("", "/manifest.json", "/model.onnx"))]


def test_a_directory_is_published_whole_without_hidden_files_and_an_earlier_manifest(artifact: Path, repository: Path) -> None:
    folder = artifact.parent
    artifact.rename(folder / "model.onnx")
    (folder / "assets").mkdir()
    (folder / "assets" / "vocabulary.txt").symlink_to(Path(__file__))
    for name in (".DS_Store", "manifest.json", "manifest.json.sig"):
        (folder / name).write_text("old")
    published = publish_digits(folder, repository)
    assert sorted(published.manifest.files) == ["assets/vocabulary.txt", "model.onnx"]
    assert (Path(published.location) / "assets" / "vocabulary.txt").read_bytes() == Path(__file__).read_bytes()
    verify(repository / "digits", Path(published.location))


def test_a_file_gets_the_name_that_the_models_configuration_expects(artifact: Path, repository: Path) -> None:
    (repository / "digits").mkdir(parents=True)
    (repository / "digits" / "model.toml").write_text('backend = "onnxruntime"\nfilename = "net.onnx"\n')
    assert list(publish_digits(artifact, repository).manifest.files) == ["net.onnx"]


def test_the_parent_is_the_highest_version_below(artifact: Path, repository: Path) -> None:
    parents = [publish_digits(artifact, repository, version=version).manifest.parent_version for version in (5, 9, 7, 2)]
    assert parents == [None, 5, 5, None]
    assert publish_digits(artifact, repository).manifest.version == 10


def test_the_commit_is_that_of_the_artifacts_working_tree(artifact: Path, repository: Path) -> None:
    git = ["git", "-C", str(artifact.parent), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-gpg-sign", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert publish_digits(artifact, repository).manifest.git_commit == head


def test_others_may_read_what_is_published_as_far_as_the_umask_lets_them(artifact: Path, repository: Path) -> None:
    artifact.chmod(0o600)
    before = os.umask(0o022)
    try:
        directory = Path(publish_digits(artifact, repository).location)
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in (directory, directory / "model.onnx")] == ["0o755", "0o644"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_invalid_model_is_refused_before_anything_is_published(artifact: Path, repository: Path) -> None:
    artifact.write_bytes(b"not a model")
    with pytest.raises(LoadError, match=r"trained\.onnx was not published: onnxruntime could not load model\.onnx"):
        publish_digits(artifact, repository)
    assert not repository.exists()


def test_a_model_that_contradicts_its_configuration_is_refused(artifact: Path, repository: Path) -> None:
    (repository / "digits").mkdir(parents=True)
    (repository / "digits" / "model.toml").write_text('[[input]]\nname = "nothing"\n')
    with pytest.raises(LoadError, match=r"model\.toml: input 'nothing' is not in the model"):
        publish_digits(artifact, repository)
    assert everything_in(repository) == ["digits", "digits/model.toml"]


@pytest.mark.parametrize("there", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_version_is_never_overwritten_not_even_an_empty_one(artifact: Path, repository: Path, there: Any) -> None:
    (repository / "digits").mkdir(parents=True)
    there(repository / "digits" / "3")
    with pytest.raises(AlreadyExists, match="digits:3 exists"):
        publish_digits(artifact, repository, version=3)
    assert everything_in(repository) == ["digits", "digits/3"]


def test_two_that_publish_at_once_get_two_numbers(artifact: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_late(staging: Path, manifest: Any) -> bytes:
        monkeypatch.setattr(module, "write_manifest", write_manifest)
        publish_digits(artifact, repository)
        return write_manifest(staging, manifest)

    monkeypatch.setattr(module, "write_manifest", write_late)
    assert publish_digits(artifact, repository).manifest.version == 2
    assert [read_manifest(repository / "digits" / str(number)).version for number in (1, 2)] == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()])
def test_whatever_goes_wrong_nothing_of_the_attempt_is_left(
    artifact: Path, repository: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        assert any(path.name.startswith(".staging-") for path in (repository / "digits").iterdir())
        raise error

    monkeypatch.setattr(module, "write_manifest", fail)
    with pytest.raises(type(error)):
        publish_digits(artifact, repository)
    assert not repository.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "_cache", "12", " a", "a\n", "a\0"])
def test_a_name_that_no_source_would_offer_is_refused(artifact: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name: expected"):
        Order(artifact, name)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "model.toml").touch(), "belongs into the model's directory"),
        (lambda folder: (folder / "loop").symlink_to("."), "found a link to a directory"),
        (lambda folder: (folder / "gone").symlink_to("nowhere"), "found a dangling link"),
        (lambda folder: os.mkfifo(folder / "pipe"), "found a dangling link or a special file"),
    ],
)
def test_a_directory_that_is_no_version_is_refused(artifact: Path, repository: Path, prepare: Any, message: str) -> None:
    prepare(artifact.parent)
    with pytest.raises(ConfigError, match=message):
        publish_digits(artifact.parent, repository)
    assert not repository.exists()


def test_a_single_models_directory_and_the_model_itself_are_no_repositories(artifact: Path, repository: Path) -> None:
    publish_digits(artifact, repository)
    with pytest.raises(ConfigError, match="is a model itself"):
        publish_digits(artifact, repository / "digits")
    with pytest.raises(ConfigError, match="is a file"):
        publish_digits(artifact, artifact)
    with pytest.raises(ConfigError, match="without the repository in it"):
        publish_digits(repository.parent, repository)


def test_a_drift_reference_travels_with_the_version_and_is_verified_with_it(artifact: Path, repository: Path, tmp_path: Path) -> None:
    reference = tmp_path / "measured.msgpack"
    with pytest.raises(ConfigError, match="--reference: expected a file, found none at"):
        publish_digits(artifact, repository, reference=reference)
    reference.write_bytes(b"bins")
    with pytest.raises(LoadError, match=r"was not published: drift\.msgpack: expected msgpack"):
        publish_digits(artifact, repository, reference=reference)
    feature = Feature(Side.INPUT, "picture", "mean", Kind.NUMERIC, Extract.MEAN)
    counted = FeatureReference(feature, (0.5,), (), (3, 4))
    reference.write_bytes(encode(Reference("digits", "profile", 7, (counted,))))
    with pytest.raises(LoadError, match="input 'picture' is not in model 'digits', which has x: it was made for another model"):
        publish_digits(artifact, repository, reference=reference)
    reference.write_bytes(encode(Reference("digits", "profile", 7, (replace(counted, feature=replace(feature, tensor="x")),))))
    published = publish_digits(artifact, repository, reference=reference)
    there = Path(published.location) / "drift.msgpack"
    assert there.read_bytes() == reference.read_bytes()
    there.write_bytes(there.read_bytes()[:-1] + b"!")
    with pytest.raises(LoadError, match=r"drift\.msgpack: expected sha256"):
        verify(repository / "digits", Path(published.location))


# -- signatures --------------------------------------------------------------------------------------------------------


def write_key(path: Path, key: Any = None, encryption: Any = None) -> Path:
    key = key or ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key.pem")


def require(repository: Path, key: Path, policy: str = "require") -> None:
    directory = repository / "digits"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "key.pub").write_bytes(key.with_suffix(".pub").read_bytes())
    (directory / "model.toml").write_text(f'signature_policy = "{policy}"\nsignature_key = "key.pub"\n')


def test_a_signed_version_satisfies_a_model_that_requires_it(artifact: Path, repository: Path, key: Path) -> None:
    require(repository, key)
    published = publish_digits(artifact, repository, signing_key=key)
    assert published.is_signed
    assert verify(repository / "digits", Path(published.location)).is_signed


def test_signatures_are_what_openssl_makes_and_checks(artifact: Path, repository: Path, key: Path, tmp_path: Path) -> None:
    directory = Path(publish_digits(artifact, repository, signing_key=key).location)
    subprocess.run(["openssl", "base64", "-d", "-in", directory / "manifest.json.sig", "-out", tmp_path / "der"], check=True)
    command = [
        "openssl",
        "dgst",
        "-sha256",
        "-verify",
        key.with_suffix(".pub"),
        "-signature",
        tmp_path / "der",
        directory / "manifest.json",
    ]
    subprocess.run(command, check=True, capture_output=True)


def change_the_manifest(directory: Path) -> None:
    text = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(text.replace('"metadata": {}', '"metadata": {"approved": "yes"}'))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda directory: (directory / "manifest.json.sig").unlink(), r"digits/1: expected manifest\.json\.sig"),
        (lambda directory: (directory / "manifest.json").unlink(), r"digits/1: expected manifest\.json and its signature"),
        (lambda directory: (directory / "manifest.json.sig").write_text("?"), "expected a base64 text"),
        (lambda directory: (directory / "manifest.json.sig").write_text("MAYCAQECAQE="), r"not a signature of this manifest by key\.pub"),
        (change_the_manifest, "not a signature of this manifest"),
        (lambda directory: (directory / "model.onnx").write_bytes(b"other"), r"model\.onnx: expected .* bytes"),
        (lambda directory: (directory.parent / "key.pub").unlink(), "signature_key 'key.pub': No such file"),
        (lambda directory: (directory.parent / "key.pub").write_text("?"), "expected a PEM file with a public key"),
    ],
)
def test_where_signatures_are_required_nothing_less_is_taken(
    artifact: Path, repository: Path, key: Path, tamper: Any, message: str
) -> None:
    require(repository, key)
    directory = Path(publish_digits(artifact, repository, signing_key=key).location)
    tamper(directory)
    with pytest.raises(LoadError, match=message):
        verify(repository / "digits", directory)


def test_a_signature_by_somebody_else_is_none(artifact: Path, repository: Path, key: Path, tmp_path: Path) -> None:
    require(repository, write_key(tmp_path / "trusted.pem"))
    directory = Path(publish_digits(artifact, repository, signing_key=key).location)
    with pytest.raises(LoadError, match="not a signature of this manifest"):
        verify(repository / "digits", directory)


def test_an_old_signed_version_does_not_pass_for_a_new_one_or_for_another_model(artifact: Path, repository: Path, key: Path) -> None:
    require(repository, key)
    directory = Path(publish_digits(artifact, repository, signing_key=key).location)
    renamed = directory.rename(directory.parent / "2")
    with pytest.raises(LoadError, match="signed for digits:1, expected this model and version"):
        verify(repository / "digits", renamed)


def test_a_key_outside_the_models_directory_is_refused(artifact: Path, repository: Path, key: Path) -> None:
    require(repository, key)
    directory = Path(publish_digits(artifact, repository, signing_key=key).location)
    for name in ("../key.pub", "1/key.pub", str(key)):
        (repository / "digits" / "model.toml").write_text(f'signature_policy = "require"\nsignature_key = "{name}"\n')
        with pytest.raises(LoadError, match=r"expected a file beside model\.toml"):
            verify(repository / "digits", directory)
    (repository / "digits" / "key.pub").unlink()
    (repository / "digits" / "key.pub").symlink_to(key.with_suffix(".pub"))
    (repository / "digits" / "model.toml").write_text('signature_policy = "require"\nsignature_key = "key.pub"\n')
    with pytest.raises(LoadError, match=r"expected a file beside model\.toml"):
        verify(repository / "digits", directory)


def test_a_policy_without_a_key_is_a_mistake_in_model_toml(artifact: Path, repository: Path) -> None:
    (repository / "digits").mkdir(parents=True)
    (repository / "digits" / "model.toml").write_text('signature_policy = "require"\n')
    with pytest.raises(ConfigError, match=r"digits/model\.toml: signature_policy 'require': expected signature_key"):
        verify(repository / "digits", repository / "digits" / "1")


def test_without_a_policy_nothing_counts_as_signed(artifact: Path, repository: Path, key: Path) -> None:
    published = publish_digits(artifact, repository, signing_key=key)
    assert not verify(repository / "digits", Path(published.location)).is_signed


def test_warn_takes_the_version_and_says_once_why_it_is_not_signed(
    artifact: Path, repository: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(verification, "log", log)
    require(repository, key, "warn")
    assert not verify(repository / "digits", Path(publish_digits(artifact, repository).location)).is_signed
    assert [(call.method_name, call.kwargs["model"], call.kwargs["version"]) for call in log.calls] == [("warning", "digits", "1")]
    assert "expected manifest.json.sig" in log.calls[0].kwargs["reason"]


def test_a_directory_without_manifest_is_taken_as_it_is(artifact: Path, repository: Path) -> None:
    directory = Path(publish_digits(artifact, repository).location)
    (directory / "manifest.json").unlink()
    (directory / "more").touch()
    verify(repository / "digits", directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("no key"), "expected a PEM file with a private key"),
        (lambda path: write_key(path, ec.generate_private_key(ec.SECP384R1())), "expected a private key on the curve P-256, got another"),
        (lambda path: write_key(path, ed25519.Ed25519PrivateKey.generate()), "expected a private key on the curve P-256, got another"),
        (lambda path: write_key(path, encryption=BestAvailableEncryption(b"word")), "without a passphrase"),
        (lambda path: None, "No such file"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_anything_is_copied(
    artifact: Path, repository: Path, tmp_path: Path, make: Any, message: str
) -> None:
    make(tmp_path / "odd.pem")
    with pytest.raises(ConfigError, match=message):
        publish_digits(artifact, repository, signing_key=tmp_path / "odd.pem")
    assert not repository.exists()


# -- the command -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return cli.main(["publish", *map(str, arguments)]), *capsys.readouterr()


def test_the_command_says_what_it_published(artifact: Path, repository: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, artifact, "--to", repository, "--name", "digits", "--sign", key)
    size = artifact.stat().st_size
    assert (code, out, err) == (0, f"published digits:1 to {repository}/digits/1: 1 file, {size} bytes, signed\n", "")


def test_the_command_speaks_json_to_machines(artifact: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, artifact, "--to", repository, "--name", "digits", "--json", "--metadata", "a=b=c", "d=")
    table = json.loads(out)
    assert (code, table["version"], table["signed"], list(table["files"])) == (0, 1, False, ["model.onnx"])
    assert read_manifest(Path(table["location"])).metadata == {"a": "b=c", "d": ""}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot publish digits: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "models/digits"), "cannot publish digits: Permission denied: models/digits"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_exit_code_1(
    artifact: Path,
    repository: Path,
    error: BaseException,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "_copy_file", fail)
    assert run(capsys, artifact, "--to", repository, "--name", "digits") == (1, "", f"headrace: {message}\n")
    assert not repository.exists()


def test_an_existing_version_and_an_invalid_model_are_exit_code_1(
    artifact: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_digits(artifact, repository)
    code, _, err = run(capsys, artifact, "--to", repository, "--name", "digits", "--version", "1")
    assert (code, err.count("\n")) == (1, 1)
    artifact.write_bytes(b"not a model")
    code, _, err = run(capsys, artifact, "--to", repository, "--name", "digits")
    assert (code, err.count("\n")) == (1, 1)
    assert everything_in(repository / "digits") == ["1", "1/manifest.json", "1/model.onnx"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gopher://bucket/models", "--name", "a"], "--to: 'gopher://bucket/models': unknown scheme 'gopher'"),
        (["--to", "models", "--name", "a/b"], "--name: expected"),
        (["--to", "models", "--name", "a", "--version", "0"], "--version: expected a number from 1, got 0"),
        (["--to", "models", "--name", "a", "--metadata", "x"], "--metadata: expected KEY=VALUE, got 'x'"),
    ],
)
def test_wrong_use_is_exit_code_2(artifact: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, artifact, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_check_tells_of_a_version_that_is_not_as_published(artifact: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(publish_digits(artifact, repository).location)
    (directory / "extra.so").touch()
    assert cli.main(["check", str(repository)]) == 1
    assert 'digits/1: file "extra.so" is not in manifest.json' in capsys.readouterr().out
