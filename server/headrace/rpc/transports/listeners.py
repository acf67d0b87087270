"""What the transports listen on: HOST:PORT or unix:PATH, and the certificates for the former."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from headrace.config import ServerConfig
from headrace.errors import ConfigError

UNIX = "unix:"
SOCKET_MODE = 0o660
"""A Unix socket has no TLS and no password: whoever may open it may use it. Owner and group, whatever the umask says."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM contents. With `client_authorities` every client must present a certificate that they signed (mutual TLS)."""

    key: bytes
    chain: bytes
    client_authorities: bytes | None


def load_certificates(config: ServerConfig) -> Certificates | None:
    """None when TLS is off. Raises ConfigError for files that cannot be read or do not belong together."""
    if not config.tls_certificate:
        return None
    authorities = _read_pem("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    certificates = Certificates(_read_pem("tls_key", config.tls_key), _read_pem("tls_certificate", config.tls_certificate), authorities)
    # gRPC itself takes any bytes and then fails every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password=_refuse_password)
    except (ssl.SSLError, ValueError) as error:
        pair = f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key}"
        raise ConfigError(f"{pair}: expected a matching PEM pair: {error}") from None
    if config.tls_client_ca:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls_client_ca: expected PEM certificates in {config.tls_client_ca}: {error}") from None
    return certificates


def _refuse_password() -> str:
    raise ValueError("the key is encrypted; expected one without a password")


def _read_pem(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: could not read {path}: {error.strerror}") from None


def clear_stale_socket(path: Path) -> None:
    """Make way for a socket at `path`. What a killed server left behind is deleted; anything else there is a ConfigError."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"grpc: could not listen on unix:{path}: no directory {path.parent}") from None
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"grpc: could not listen on unix:{path}: it exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    # gRPC would delete it and listen in its place, and the other server would wait for ever.
    raise ConfigError(f"grpc: could not listen on unix:{path}: another server does")


def bind_problem(listener: str) -> str:
    """Why HOST:PORT cannot be bound, in the system's words; gRPC's own exception does not say."""
    host, _, port = listener.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return "refused"
