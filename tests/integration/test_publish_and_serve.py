"""From `headrace publish` to an answer, and what a running server says of a publication that is not what was published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from headrace import cli
from headrace.testing import serve_in_process


def publish(folder: Path, name: str, *flags: str) -> Path:
    """Through the command; a classifier of 8x8 images into 10 classes. The repository is `folder`/models."""
    artifact = onnx_models.save(onnx_models.mlp(64, 32, 10), folder / "build", "trained.onnx")
    (folder / "models").mkdir(exist_ok=True)
    assert cli.main(["publish", str(artifact), "--to", str(folder / "models"), "--name", name, *flags]) == 0
    return max((folder / "models" / name).glob("[0-9]*"))


def make_key(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder / "key.pem"


def require_signatures(folder: Path, name: str) -> None:
    (folder / "models" / name / "key.pub").write_bytes((folder / "key.pub").read_bytes())
    (folder / "models" / name / "model.toml").write_text('signature_policy = "require"\nsignature_key = "key.pub"\n')


async def infer(client: Any, model: str) -> Any:
    tensor = triton.InferInput("x", [2, 64], "FP32")
    tensor.set_data_from_numpy(np.ones((2, 64), np.float32))
    return (await client.infer(model, [tensor])).as_numpy("y")


async def read_index(client: Any) -> dict[str, tuple[str, str]]:
    index = await client.get_model_repository_index()
    return {f"{entry.name}:{entry.version}": (entry.state, entry.reason) for entry in index.models}


async def test_a_published_and_signed_model_is_served(tmp_path: Path) -> None:
    publish(tmp_path, "digits", "--sign", str(make_key(tmp_path)))
    require_signatures(tmp_path, "digits")
    async with serve_in_process(tmp_path / "models") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert (await infer(client, "digits")).shape == (2, 10)


def flip_a_bit(version: Path) -> None:
    content = bytearray((version / "model.onnx").read_bytes())
    content[-1] ^= 1
    (version / "model.onnx").write_bytes(content)


def cut_in_half(version: Path) -> None:
    content = (version / "model.onnx").read_bytes()
    (version / "model.onnx").write_bytes(content[: len(content) // 2])


def sign_by_nobody(version: Path) -> None:
    table = json.loads((version / "manifest.json").read_text())
    (version / "manifest.json").write_text(json.dumps({**table, "metadata": {"approved": "yes"}}))


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (cut_in_half, "digits/1/model.onnx: expected "),
        (flip_a_bit, "digits/1/model.onnx: expected sha256 "),
        (lambda version: (version / "model.onnx").unlink(), "digits/1/model.onnx: is in manifest.json but missing"),
        (lambda version: (version / "extra.so").touch(), 'digits/1: file "extra.so" is not in manifest.json'),
        (sign_by_nobody, "digits/1/manifest.json.sig: not a signature of this manifest by key.pub"),
        (lambda version: (version / "manifest.json.sig").unlink(), "digits/1: expected manifest.json.sig"),
    ],
)
async def test_a_publication_that_was_tampered_with_fails_with_its_reason_while_another_model_serves(
    tmp_path: Path, tamper: Callable[[Path], object], reason: str
) -> None:
    tampered = publish(tmp_path, "digits", "--sign", str(make_key(tmp_path)))
    require_signatures(tmp_path, "digits")
    publish(tmp_path, "letters")
    tamper(tampered)
    async with serve_in_process(tmp_path / "models") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        index = await read_index(client)
        assert index["letters:1"] == ("READY", "")
        assert index["digits:1"][0] == "UNAVAILABLE"
        assert index["digits:1"][1].startswith(reason)
        assert not await client.is_model_ready("digits")
        assert (await infer(client, "letters")).shape == (2, 10)


async def test_an_unsigned_manifest_that_cannot_be_read_fails_its_version(tmp_path: Path) -> None:
    (publish(tmp_path, "digits") / "manifest.json").write_text("{")
    async with serve_in_process(tmp_path / "models") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        state, reason = (await read_index(client))["digits:1"]
    assert state == "UNAVAILABLE"
    assert reason.startswith("digits/1/manifest.json: not valid JSON")


async def test_a_bad_version_leaves_the_good_one_beside_it_serving(tmp_path: Path) -> None:
    publish(tmp_path, "digits")
    flip_a_bit(publish(tmp_path, "digits"))
    (tmp_path / "models" / "digits" / "model.toml").write_text('version_policy = "all"\n')
    async with serve_in_process(tmp_path / "models") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        index = await read_index(client)
        assert (index["digits:1"][0], index["digits:2"][0]) == ("READY", "UNAVAILABLE")
        assert (await infer(client, "digits")).shape == (2, 10)
