"""`headrace health`: a probe for containers and supervisors. Exit codes: 0 ready, 1 not ready or no answer, 2 wrong use."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
from pathlib import Path
from typing import Any

from headrace.config import check_listener
from headrace.config_loading import load_server_config
from headrace.errors import ConfigError, HeadraceError

READY, NOT_READY = 0, 1

LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
"""Where a listener on every address is reached from its own machine."""


def add_health(health: argparse.ArgumentParser) -> None:
    """Give the parser of `headrace health` its flags."""
    place = health.add_mutually_exclusive_group()
    place.add_argument("--http", default="", metavar="HOST:PORT", help="ask here; left out: where `headrace serve` listens by the same "
                       "environment and HEADRACE_CONFIG")  # fmt: skip
    place.add_argument("--grpc", default="", metavar="ADDRESS", help="ask over gRPC instead, HOST:PORT or unix:PATH")
    health.add_argument("--live", action="store_true", help="whether the process runs; left out: whether it may be sent requests")
    health.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="how long to wait for an answer (5)")
    health.add_argument("--tls-ca", default="", metavar="PEM", help="authorities that the certificate is checked against (gRPC); TLS")
    health.add_argument("--tls-certificate", default="", metavar="PEM", help="certificate to show to the server (mutual TLS)")
    health.add_argument("--tls-key", default="", metavar="PEM", help="its private key")
    health.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The exit code, and one line of why. Raises ConfigError for wrong use."""
    if not 0 < options.timeout < 1e6:
        raise ConfigError(f"--timeout: expected a number of seconds above 0, got {options.timeout:g}")
    for name, given in (("http", options.http), ("grpc", options.grpc)):
        if given:
            check_listener(name, given)
    http_address, grpc_address = (options.http, options.grpc) if options.http or options.grpc else _configured()
    if http_address:
        ready, reason = ask_http(reached(http_address), options.timeout, is_live_enough=options.live)
    else:
        ready, reason = _ask_grpc(options, reached(grpc_address))
    print(reason, file=sys.stdout if ready else sys.stderr)
    return READY if ready else NOT_READY


def _configured() -> tuple[str, str]:
    """The HTTP listener and the first gRPC listener. Raises ConfigError when there is none at all."""
    file = os.environ.get("HEADRACE_CONFIG")
    config = load_server_config({}, os.environ, Path(file) if file is not None else None)
    if not (config.http or config.grpc):
        raise ConfigError("health: expected --http, --grpc or a listener in the configuration, got none")
    return config.http, config.grpc[0] if config.grpc else ""


def reached(listener: str) -> str:
    """The address by which a client on the same machine reaches it."""
    host, separator, port = listener.rpartition(":")
    return listener if listener.startswith("unix:") or not separator else f"{LOOPBACK.get(host, host)}:{port}"


def ask_http(address: str, timeout: float, *, is_live_enough: bool = False) -> tuple[bool, str]:
    """(whether it is, the reason). Without gRPC and without proxies: a probe runs every few seconds, on the server's own cores."""
    host, _, port = address.rpartition(":")
    path = "/livez" if is_live_enough else "/readyz"
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer from http://{address}{path}: {error or type(error).__name__}"
    finally:
        connection.close()
    return answer.status == 200, f"http://{address}{path}: {answer.status}{_reason(body)}"


def _reason(body: bytes) -> str:
    try:
        table: Any = json.loads(body)
    except ValueError:
        return ""
    reason = table.get("reason") if isinstance(table, dict) else None
    return f", {reason}" if isinstance(reason, str) else ""


def _ask_grpc(options: argparse.Namespace, address: str) -> tuple[bool, str]:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from headrace.rpc.admin_client import Tls
    from headrace.rpc.health_client import ask_server

    tls = Tls(options.tls_ca, options.tls_certificate, options.tls_key)
    try:
        ready = ask_server(address, tls, options.timeout, is_live_enough=options.live)
    except ConfigError:
        raise
    except HeadraceError as error:
        return False, str(error)
    what = "live" if options.live else "ready"
    return ready, f"{address}: {what if ready else 'not ' + what}"
