"""Which transport serves a configuration."""

from __future__ import annotations

import importlib.util

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
    """native or grpcio. Raises ConfigError where native is asked for and not installed."""
    is_installed = importlib.util.find_spec("pygrpc_native") is not None
    if config.transport == "native" and not is_installed:
        raise ConfigError("transport native: expected the package pygrpc-native, pip install 'headrace[native]'")
    if config.transport != "auto":
        return config.transport
    is_of_use = any(not config.tls_certificate or listener.startswith(UNIX) for listener in config.grpc)
    return "native" if is_installed and is_of_use else "grpcio"
