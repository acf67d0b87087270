"""Where a transport listens: several addresses, Unix sockets, TLS and mutual TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from headrace.errors import ConfigError
from headrace.wire.messages import ModelInferResponse
from scripted_models import ScriptedVersion, infer_message
from served_models import Serve


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "headrace.sock"


def file_mode(path: Path) -> int | None:
    return path.stat().st_mode if path.exists() else None


async def infer(channel: grpc.aio.Channel) -> ModelInferResponse:
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", response_deserializer=ModelInferResponse.FromString)
    async with channel:
        return await call(infer_message(id="r"), timeout=10)


async def test_several_listeners_serve_the_same_models(serve: Serve, socket_path: Path) -> None:
    listeners = ("127.0.0.1:0", "localhost:0", f"unix:{socket_path}")
    async with serve(ScriptedVersion(), grpc=listeners) as served:
        assert len(set(served.addresses)) == 3
        assert [address.rpartition(":")[0] for address in served.addresses] == ["127.0.0.1", "localhost", "unix"]
        for address in served.addresses:
            assert (await infer(grpc.aio.insecure_channel(address))).id == "r"


async def test_a_unix_socket_is_for_owner_and_group_and_goes_with_the_server(serve: Serve, socket_path: Path) -> None:
    async with serve(ScriptedVersion(), grpc=(f"unix:{socket_path}",)):
        assert file_mode(socket_path) == stat.S_IFSOCK | 0o660
    assert file_mode(socket_path) is None


async def test_a_socket_that_a_killed_server_left_is_no_obstacle(serve: Serve, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_path))
    async with serve(ScriptedVersion(), grpc=(f"unix:{socket_path}",)) as served:
        assert (await infer(grpc.aio.insecure_channel(served.address))).id == "r"


async def test_a_second_server_does_not_take_the_first_ones_socket(serve: Serve, socket_path: Path) -> None:
    async with serve(ScriptedVersion(), grpc=(f"unix:{socket_path}",)) as served:
        with pytest.raises(ConfigError, match="another server does"):
            async with serve(ScriptedVersion(), grpc=(f"unix:{socket_path}",)):
                pass
        assert (await infer(grpc.aio.insecure_channel(served.address))).id == "r"


async def test_a_second_server_does_not_share_the_first_ones_port(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served:
        with pytest.raises(ConfigError, match=f"could not listen on {served.address}: {os.strerror(98)}"):
            async with serve(ScriptedVersion(), grpc=(served.address,)):
                pass


# -- TLS ---------------------------------------------------------------------------------------------------------------


@dataclass
class Certificates:
    folder: Path
    authority: trustme.CA

    def options(self, *, mutual: bool = False) -> dict[str, str]:
        names = {"tls_certificate": "chain.pem", "tls_key": "key.pem", **({"tls_client_ca": "ca.pem"} if mutual else {})}
        return {key: str(self.folder / name) for key, name in names.items()}

    def channel(self, address: str, client: trustme.LeafCert | None = None) -> grpc.aio.Channel:
        roots = self.authority.cert_pem.bytes()
        if client is None:
            return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots))
        key, chain = client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots, key, chain))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    (tmp_path / "chain.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return Certificates(tmp_path, authority)


async def test_tls(serve: Serve, certificates: Certificates) -> None:
    async with serve(ScriptedVersion(), **certificates.options()) as served:
        assert (await infer(certificates.channel(served.address))).id == "r"
        with pytest.raises(grpc.aio.AioRpcError):
            await infer(grpc.aio.insecure_channel(served.address))


async def test_mutual_tls_wants_a_certificate_of_the_right_authority(serve: Serve, certificates: Certificates) -> None:
    async with serve(ScriptedVersion(), **certificates.options(mutual=True)) as served:
        friend, stranger = certificates.authority.issue_cert("friend"), trustme.CA().issue_cert("stranger")
        assert (await infer(certificates.channel(served.address, friend))).id == "r"
        for channel in (certificates.channel(served.address), certificates.channel(served.address, stranger)):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await infer(channel)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_unix_socket_beside_a_tls_port_needs_no_certificate(serve: Serve, certificates: Certificates, socket_path: Path) -> None:
    async with serve(ScriptedVersion(), grpc=("127.0.0.1:0", f"unix:{socket_path}"), **certificates.options()) as served:
        secure, local = served.addresses
        answers = await asyncio.gather(infer(certificates.channel(secure)), infer(grpc.aio.insecure_channel(local)))
        assert [answer.id for answer in answers] == ["r", "r"]
