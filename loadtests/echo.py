"""A gRPC server that infers nothing: what the transport alone costs, and so the most that a server on it can do.

    python -m loadtests.echo native|grpcio --address 127.0.0.1:PORT [--mode empty|tensor]

ModelInfer is answered at once, with an empty ModelInferResponse (`empty`, in which every field has its default), or with the
request's tensors as outputs (`tensor`: for large messages, where moving the bytes is the cost). `native` is the leanest loop that
pygrpc-native allows: one thread for HTTP/2, one that takes calls in batches and answers them where it stands. `grpcio` is grpc.aio on
uvloop with raw bytes in and out. Whoever asks whether server or model is ready hears yes; every other method is unimplemented.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import uvloop
from pygrpc_native import EVENT_CALL, NativeGrpcFront

SERVICE = "inference.GRPCInferenceService"
READY = b"\x08\x01"
"""`true` in field 1: the answer of ServerLive, ServerReady and ModelReady."""
MAX_EVENTS = 64

Answer = Callable[[bytes], bytes]

# Tags of the fields that a request and its answer need: number << 3 | 2, all length-delimited.
_MODEL_NAME, _INPUT, _RAW_INPUT, _RAW_OUTPUT = 0x0A, 0x2A, 0x3A, b"\x32"


def empty_answer(request: bytes) -> bytes:
    return b""


def tensor_answer(request: bytes) -> bytes:
    """The request's tensors as a ModelInferResponse: name, datatype, shape and bytes, copied once.

    An output tensor has the fields of an input tensor under the same numbers, and stands under the number of an input. Only raw
    contents are numbered otherwise. Raises ValueError on what is no ModelInferRequest.
    """
    view = memoryview(request)
    parts: list[bytes | memoryview] = []
    at = 0
    while at < len(request):
        tag, length_at = request[at], at + 1
        if tag & 0x87 != 2:
            raise ValueError(f"expected length-delimited fields numbered below 16, got the tag {tag} at byte {at}")
        length, content_at = _read_varint(request, length_at)
        end = content_at + length
        if end > len(request):
            raise ValueError(f"the field at byte {at} has {length} bytes, the message ends after {len(request) - content_at}")
        if tag == _RAW_INPUT:
            parts += (_RAW_OUTPUT, view[length_at:end])
        elif tag in (_MODEL_NAME, _INPUT):
            parts.append(view[at:end])
        at = end
    return b"".join(parts)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The value and where it ends."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"the message ends within a length, after {len(message)} bytes")


MODES: dict[str, Answer] = {"empty": empty_answer, "tensor": tensor_answer}


def methods(infer: Answer) -> dict[str, Answer]:
    def ready(request: bytes) -> bytes:
        return READY

    return {"ModelInfer": infer, "ServerLive": ready, "ServerReady": ready, "ModelReady": ready}


def serve_native(address: str, answers: Mapping[str, Answer]) -> None:
    """Until SIGINT or SIGTERM."""
    front = NativeGrpcFront(address, [(f"/{SERVICE}/{name}", False) for name in answers], io_threads=1)
    front.start()
    receiver = threading.Thread(target=_answer_all, args=(front, [*answers.values()]), name="receive")
    receiver.start()
    _announce(f"{address.rpartition(':')[0]}:{front.bound_port}")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    front.close()
    receiver.join()


def _answer_all(front: NativeGrpcFront, answers: list[Answer]) -> None:
    receive, respond = front.recv_batch, front.respond
    while (events := receive(MAX_EVENTS)) is not None:
        for kind, call_id, method, message, _ in events:
            if kind == EVENT_CALL and message is not None:
                try:
                    respond(call_id, answers[method](message))
                except ValueError as error:
                    front.fail(call_id, grpc.StatusCode.INVALID_ARGUMENT.value[0], str(error))


async def serve_grpcio(address: str, answers: Mapping[str, Answer]) -> None:
    """Until SIGINT or SIGTERM."""
    server: Any = grpc.aio.server(
        # As the server's own: two on one port would share the calls unnoticed.
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)],
        handlers=[grpc.method_handlers_generic_handler(SERVICE, {name: _unary(answer) for name, answer in answers.items()})],
    )
    port = server.add_insecure_port(address)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await server.start()
    _announce(f"{address.rpartition(':')[0]}:{port}")
    await stopped.wait()
    await server.stop(None)


def _unary(answer: Answer) -> Any:
    async def call(request: bytes, context: Any) -> bytes:
        try:
            return answer(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    return grpc.unary_unary_rpc_method_handler(call)


def _announce(address: str) -> None:
    print(f"listening on {address}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="loadtests.echo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transport", choices=["native", "grpcio"])
    parser.add_argument("--address", default="127.0.0.1:8001", help="host and port; port 0 takes a free one (default: 127.0.0.1:8001)")
    parser.add_argument("--mode", choices=[*MODES], default="empty")
    arguments = parser.parse_args()
    answers = methods(MODES[arguments.mode])
    try:
        if arguments.transport == "grpcio":
            uvloop.run(serve_grpcio(arguments.address, answers))
        else:
            # Before any thread is started: all of them inherit it, and only sigwait sees the signals.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            serve_native(arguments.address, answers)
    except (OSError, RuntimeError, ValueError) as error:  # what the two transports raise for an address that cannot be had
        print(f"echo: could not listen on {arguments.address}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
