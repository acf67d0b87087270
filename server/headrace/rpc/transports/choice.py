"""Which transport serves a configuration."""

from __future__ import annotations

import importlib

from headrace.config import ServerConfig
from headrace.errors import ConfigError
from headrace.rpc.transports.base import Services, Transport
from headrace.rpc.transports.grpcio import GrpcioTransport
from headrace.rpc.transports.listeners import UNIX


def open_transport(services: Services, config: ServerConfig) -> Transport:
    """The one that the configuration asks for; auto takes native where it is installed and of use. Raises ConfigError."""
    if choose(config) == "grpcio":
        return GrpcioTransport(services, config)
    # Not at the top: the package is an extra.
    from headrace.rpc.transports.native import NativeTransport

    return NativeTransport(services, config)


def choose(config: ServerConfig) -> str:
    """native or grpcio. Raises ConfigError where native is asked for and cannot be had."""
    if config.transport == "grpcio":
        return "grpcio"
    is_of_use = any(not config.tls_certificate or listener.startswith(UNIX) for listener in config.grpc)
    if config.transport == "auto" and not is_of_use:
        return "grpcio"
    try:
        # Not only found: there are machines for which no wheel of it works.
        importlib.import_module("pygrpc_native")
    except ImportError as error:
        reason = str(error)
    else:
        return "native"
    if config.transport == "native":
        raise ConfigError(f"transport native: expected the package pygrpc-native, pip install 'headrace[native]', got: {reason}")
    return "grpcio"
