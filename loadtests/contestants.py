"""The servers that can be measured: how each is started for one repository of models."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.comparison import ECHO
from loadtests.process import ServerProcess, free_port

HEADRACE = (
    f"{shlex.quote(sys.executable)} -m headrace.cli serve --models {{repository}} --grpc 127.0.0.1:{{port}} --http 127.0.0.1:{{http_port}}"
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """`command` is split like a shell does and then filled: {repository} {model} {onnx} {max_batch} {port} {http_port}.

    `model` and `onnx` are those of the first model, for servers that take only one. `http_port` is the one after `port`.
    """

    name: str
    command: str
    is_echo: bool = False
    """Infers nothing, so that its answers are not a model's and it counts no batches."""

    def server(self, repository: Path, model: str, *, cores: Sequence[int], log: Path, max_batch: int = 64) -> ServerProcess:
        """Not yet started; enter it."""
        port = free_port(2)
        values = {
            "repository": repository,
            "model": model,
            "onnx": repository / model / "1" / "model.onnx",
            "max_batch": max_batch,
            "port": port,
            "http_port": port + 1,
        }
        command = [part.format(**values) for part in shlex.split(self.command)]
        return ServerProcess(command, address=f"127.0.0.1:{port}", cores=cores, log=log)


def headrace(transport: str | None = None) -> Contestant:
    """This checkout's server; `transport` None takes the server's default."""
    if transport is None:
        return Contestant("headrace", HEADRACE)
    return Contestant(f"headrace-{transport}", f"{HEADRACE} --transport {transport}")


def echo(transport: str, mode: str = "empty") -> Contestant:
    """The server of `loadtests.echo`."""
    command = f"{shlex.quote(sys.executable)} -m loadtests.echo {transport} --address 127.0.0.1:{{port}} --mode {mode}"
    return Contestant(f"{ECHO}{transport}", command, is_echo=True)


def triton_peer(script: str) -> Contestant:
    """Triton with its Python backend running ONNX Runtime, by a script that takes MODEL FILE MAX_BATCH PORT."""
    return Contestant("triton", f"bash {shlex.quote(script)} {{model}} {{onnx}} {{max_batch}} {{port}}")


def http_address(server: ServerProcess) -> str:
    host, _, port = server.address.rpartition(":")
    return f"{host}:{int(port) + 1}"


def add_contestant_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transport",
        action="append",
        default=[],
        help="measure headrace on this transport, repeatable (default: its own choice)",
    )
    parser.add_argument(
        "--triton",
        metavar="SCRIPT",
        default=os.environ.get("HEADRACE_TRITON_PEER"),
        help="measure Triton too [HEADRACE_TRITON_PEER]",
    )
    parser.add_argument(
        "--contestant",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more server; COMMAND may name {repository} {model} {onnx} {max_batch} {port} {http_port}",
    )
    parser.add_argument("--without-headrace", action="store_true", help="measure only the others")


def selected_contestants(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Contestant]:
    contestants = [] if arguments.without_headrace else [headrace(transport) for transport in arguments.transport or [None]]
    if arguments.triton:
        contestants.append(triton_peer(arguments.triton))
    for argument in arguments.contestant:
        name, _, command = argument.partition("=")
        if not command:
            parser.error(f"contestant {argument!r}: expected NAME=COMMAND")
        contestants.append(Contestant(name, command))
    if not contestants:
        parser.error("nobody to measure")
    return contestants


def add_echo_arguments(parser: argparse.ArgumentParser) -> None:
    """For measurements that need neither right answers nor statistics."""
    parser.add_argument(
        "--echo",
        action="append",
        default=[],
        choices=["native", "grpcio"],
        help="measure a server that infers nothing on this transport, repeatable",
    )
    parser.add_argument(
        "--echo-mode",
        default="empty",
        choices=["empty", "tensor"],
        help="what it answers: nothing, or the tensors it was sent (default: empty)",
    )


def selected_echoes(arguments: argparse.Namespace) -> list[Contestant]:
    return [echo(transport, arguments.echo_mode) for transport in arguments.echo]
