"""Who calls, as gRPC tells it: an address and, with mutual TLS, a name."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

COMMON_NAME = "x509_common_name"


@dataclass(frozen=True, slots=True)
class Peer:
    """`is_local`: on this machine, by loopback or a Unix socket. `identity`: the common name of a verified certificate."""

    address: str
    is_local: bool
    identity: str = ""

    @property
    def name(self) -> str:
        return self.identity or self.address


def read_peer(peer: str, properties: Mapping[str, Iterable[bytes]]) -> Peer:
    """`peer` as gRPC writes it: ipv4:127.0.0.1:5, ipv6:%5B::1%5D:5, unix:PATH. Whatever else it is, it is not local.

    `properties` are the call's auth_context. A certificate's name is among them only where the server asks for certificates, and
    then gRPC has verified it.
    """
    kind, _, rest = unquote(peer).partition(":")
    names = list(properties.get(COMMON_NAME, ()))
    identity = names[0].decode("utf-8", "replace") if names else ""
    if kind == "unix":
        return Peer("unix", True, identity)
    if kind not in ("ipv4", "ipv6"):
        return Peer(peer, False, identity)
    return Peer(rest, _is_loopback(rest.rpartition(":")[0].strip("[]")), identity)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # A listener on [::] sees 127.0.0.1 as ::ffff:127.0.0.1, which Python before 3.13 does not take for loopback.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
