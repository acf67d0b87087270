from __future__ import annotations

import sys
from typing import Any

import pytest
from headrace.config import ServerConfig
from headrace.errors import ConfigError
from headrace.rpc.transports.choice import choose

TLS = {"tls_certificate": "c.pem", "tls_key": "k.pem"}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "native"),
        ({"transport": "grpcio"}, "grpcio"),
        (TLS, "grpcio"),
        ({**TLS, "grpc": ("127.0.0.1:0", "unix:/tmp/a.sock")}, "native"),
        ({**TLS, "transport": "native"}, "native"),
    ],
    ids=["nothing said", "grpcio", "only TLS", "TLS and a socket", "native"],
)
def test_auto_takes_native_where_it_is_of_use(options: dict[str, Any], chosen: str) -> None:
    assert choose(ServerConfig(**options)) == chosen


def test_without_the_package_auto_takes_grpcio_and_native_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    assert choose(ServerConfig()) == "grpcio"
    with pytest.raises(ConfigError, match=r"expected the package pygrpc-native, pip install 'headrace\[native\]', got: "):
        choose(ServerConfig(transport="native"))
