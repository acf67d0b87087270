from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trustme
from headrace.config import ServerConfig
from headrace.errors import ConfigError
from headrace.rpc.transports.listeners import bind_problem, clear_stale_socket, load_certificates


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, str]:
    authority, other = trustme.CA(), trustme.CA()
    issued, stranger = authority.issue_cert("localhost"), other.issue_cert("localhost")
    paths = {name: tmp_path / f"{name}.pem" for name in ("chain", "key", "wrong_key", "ca", "garbage")}
    paths["chain"].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(paths["key"])
    stranger.private_key_pem.write_to_path(paths["wrong_key"])
    authority.cert_pem.write_to_path(paths["ca"])
    paths["garbage"].write_text("no certificate")
    return {name: str(path) for name, path in paths.items()}


def config(chain: str = "", key: str = "", ca: str = "") -> ServerConfig:
    return ServerConfig(tls_certificate=chain, tls_key=key, tls_client_ca=ca)


def test_no_certificate_means_no_tls() -> None:
    assert load_certificates(config()) is None


def test_a_matching_pair_is_loaded(pem: dict[str, str]) -> None:
    loaded = load_certificates(config(pem["chain"], pem["key"], pem["ca"]))
    assert loaded is not None
    assert (loaded.key, loaded.client_authorities) == (Path(pem["key"]).read_bytes(), Path(pem["ca"]).read_bytes())


@pytest.mark.parametrize(
    ("chain", "key", "ca", "said"),
    [
        ("chain", "wrong_key", "", "expected a matching PEM pair"),
        ("garbage", "key", "", "expected a matching PEM pair"),
        ("chain", "key", "garbage", "tls_client_ca: expected PEM certificates"),
    ],
)
def test_what_cannot_serve_tls_is_refused_at_start(pem: dict[str, str], chain: str, key: str, ca: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_certificates(config(pem[chain], pem[key], pem[ca] if ca else ""))


def test_a_missing_file_is_named(pem: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"tls_key: could not read /nowhere/key\.pem: No such file"):
        load_certificates(config(pem["chain"], "/nowhere/key.pem"))


def test_a_socket_left_behind_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    clear_stale_socket(path)
    assert not path.exists()


def test_a_socket_in_use_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another server does"):
            clear_stale_socket(path)
    assert path.exists()


def test_a_file_that_is_no_socket_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("keep")
    with pytest.raises(ConfigError, match="is no socket"):
        clear_stale_socket(path)
    assert path.read_text() == "keep"


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no directory {tmp_path}/sub"):
        clear_stale_socket(tmp_path / "sub" / "s")


def test_why_an_address_cannot_be_bound_is_in_the_systems_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert bind_problem(f"127.0.0.1:{other.getsockname()[1]}") == os.strerror(98)
    assert "known" in bind_problem("no-such-host.invalid:1")
