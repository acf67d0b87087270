from __future__ import annotations

import pytest
from headrace.rpc.peer import read_peer


@pytest.mark.parametrize(
    ("peer", "is_local", "address"),
    [
        ("ipv4:127.0.0.1:5", True, "127.0.0.1:5"),
        ("ipv4:127.8.9.1:50051", True, "127.8.9.1:50051"),
        ("ipv6:%5B::1%5D:5", True, "[::1]:5"),
        ("ipv6:[::1]:5", True, "[::1]:5"),
        ("ipv6:%5B::ffff:127.0.0.1%5D:5", True, "[::ffff:127.0.0.1]:5"),
        ("unix:", True, "unix"),
        ("unix:/run/headrace.sock", True, "unix"),
        ("unix:%00abstract", True, "unix"),
        ("ipv4:10.0.0.7:5", False, "10.0.0.7:5"),
        ("ipv4:0.0.0.0:5", False, "0.0.0.0:5"),
        ("ipv6:%5B2001:db8::1%5D:5", False, "[2001:db8::1]:5"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:5", False, "[::ffff:10.0.0.7]:5"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", False, "[fe80::1%eth0]:5"),
        ("ipv4:localhost:5", False, "localhost:5"),
        ("vsock:2:5", False, "vsock:2:5"),
        ("unknown", False, "unknown"),
        ("", False, ""),
    ],
)
def test_only_loopback_and_unix_sockets_are_local(peer: str, is_local: bool, address: str) -> None:
    found = read_peer(peer, {})
    assert (found.is_local, found.address, found.name) == (is_local, address, address)


def test_a_verified_certificate_names_its_bearer() -> None:
    found = read_peer("ipv4:10.0.0.7:5", {"x509_common_name": [b"deploy-bot"], "transport_security_type": [b"ssl"]})
    assert (found.name, found.address, found.is_local) == ("deploy-bot", "10.0.0.7:5", False)
    assert read_peer("unix:", {"transport_security_type": [b"insecure"]}).name == "unix"
