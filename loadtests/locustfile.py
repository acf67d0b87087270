"""Users of a server of the Open Inference Protocol, for Locust, on the stock client.

    locust -f loadtests/locustfile.py --headless --host 127.0.0.1:8001 --users 20 --spawn-rate 20 --run-time 30s PacedUser
    HEADRACE_SHAPE=ramp locust -f loadtests/locustfile.py --headless --host 127.0.0.1:8001 --peak 100 --shape-seconds 60 PacedUser
    HEADRACE_SHAPE=all locust -f loadtests/locustfile.py --class-picker --web-host 127.0.0.1 --host 127.0.0.1:8001

Every user has a connection of its own and calls the models in turn with random inputs that fit their metadata. Users wait for their
answers, so a slow server gets fewer requests: this shows how it behaves to people, not what it can do. For that is `scenarios`, whose
arrivals wait for nothing, and `compare`; Locust itself is the limit at one or two thousand requests/s a process (`--processes`).
"""

from __future__ import annotations

import itertools
import os
import time
from argparse import Namespace
from typing import Any

import grpc.experimental.gevent as grpc_gevent
import numpy as np
import tritonclient.grpc as triton
from gevent import GreenletExit
from locust import LoadTestShape, User, constant, constant_pacing, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from loadtests.locust_plan import SHAPES, TensorMetadata, random_inputs, selected_shapes

# Locust has patched the standard library when it was imported; grpc's C core needs this call to wait in greenlets instead of threads.
grpc_gevent.init_gevent()

ANSWER_TIMEOUT = 10.0
"""Seconds for what is asked of the server before the first request."""
_SHOWN = selected_shapes(os.environ.get("HEADRACE_SHAPE"))


def _add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--models", default="", metavar="NAME,NAME", help="which models are called (default: all that are ready)")
    parser.add_argument("--rows", type=int, default=1, help="in a request (default: 1)")
    parser.add_argument("--free-size", type=int, default=1, help="what free sizes other than the rows are (default: 1)")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds from one request of a PacedUser to its next (default: 0.1)")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds until a request counts as failed (default: 5)")
    parser.add_argument("--peak", type=int, default=50, help="users at the peak of a shape (default: 50)")
    parser.add_argument("--shape-seconds", type=float, default=60.0, help="how long a shape takes (default: 60)")


events.init_command_line_parser.add_listener(_add_arguments)  # type: ignore[no-untyped-call] # Locust's own has no types


def _options(environment: Environment) -> Namespace:
    assert environment.parsed_options is not None  # only where Locust is used as a library
    return Namespace(**vars(environment.parsed_options))


class Call:
    """One model and the inputs that a user sends it. Made from its metadata, once a user."""

    def __init__(self, client: Any, model: str, rows: int, free: int) -> None:
        metadata = client.get_model_metadata(model, client_timeout=ANSWER_TIMEOUT)
        tensors = [TensorMetadata(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in metadata.inputs]
        self.model = model
        self.outputs = {tensor.name for tensor in metadata.outputs}
        self.inputs = []
        datatypes = {tensor.name: tensor.datatype for tensor in tensors}
        for name, array in random_inputs(tensors, rows, free, np.random.default_rng()).items():
            # BF16 has no numpy type; the client makes it of 32-bit floats.
            datatype = datatypes[name] if datatypes[name] == "BF16" else np_to_triton_dtype(array.dtype)
            tensor = triton.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            self.inputs.append(tensor)


class InferenceUser(User):
    """Calls the models in turn, forever, and tells Locust of every call."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        """Raises StopTest when there is nothing to call: no other user could either, and Locust takes it only from here."""
        super().__init__(environment)
        if not self.host:
            environment.process_exit_code = 2
            raise StopTest("nothing to call: expected --host HOST:PORT, got none")
        options = _options(environment)
        self._deadline = options.deadline
        # Otherwise all channels of the process to one address are one connection.
        self._client = triton.InferenceServerClient(self.host, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        try:
            names = [name for name in options.models.split(",") if name] or self._ready_models()
            self._calls = itertools.cycle([Call(self._client, name, options.rows, options.free_size) for name in names])
        except (InferenceServerException, ValueError) as error:
            self.on_stop()
            environment.process_exit_code = 2
            raise StopTest(f"nothing to call at {self.host}: {error}") from None
        except GreenletExit:
            # The time was over before this user had begun.
            self.on_stop()
            raise

    def on_stop(self) -> None:
        # Gone now and not when the interpreter ends: its __del__ closes it again, and grpc then waits for ever for a lock that one of
        # its threads had when they were stopped (one run in five).
        self._client.close()
        del self._client

    def _ready_models(self) -> list[str]:
        index = self._client.get_model_repository_index(client_timeout=ANSWER_TIMEOUT).models
        if not (ready := sorted({model.name for model in index if model.state == "READY"})):
            raise ValueError(f"expected a model that is ready, got {len(index)} that are not")
        return ready

    @task
    def infer(self) -> None:
        call = next(self._calls)
        error: Exception | None = None
        length, started = 0, time.perf_counter()
        try:
            answer = self._client.infer(call.model, call.inputs, client_timeout=self._deadline).get_response()
            length = answer.ByteSize()
            if (got := {output.name for output in answer.outputs}) != call.outputs:
                error = ValueError(f"{call.model}: expected the outputs {sorted(call.outputs)}, got {sorted(got)}")
        except InferenceServerException as failure:
            error = failure
        self.environment.events.request.fire(
            request_type="ModelInfer",
            name=call.model,
            response_time=(time.perf_counter() - started) * 1e3,
            response_length=length,
            exception=error,
            context={},
        )


class PacedUser(InferenceUser):
    """One request every `--pace` seconds; later, never more of them, when answers take longer than that."""

    def wait_time(self) -> float:
        return float(constant_pacing(_options(self.environment).pace)(self))


class BusyUser(InferenceUser):
    """The next request as soon as the last is answered."""

    wait_time = constant(0)


class _Planned(LoadTestShape):
    """`--peak` users at most, for `--shape-seconds`."""

    abstract = True
    plan = ""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options = _options(self.runner.environment)
        users = SHAPES[self.plan](time.perf_counter() - self.start_time, options.shape_seconds, options.peak)
        return None if users is None else (users, float(options.peak))


class Ramp(_Planned):
    abstract = "ramp" not in _SHOWN
    plan = "ramp"


class Spike(_Planned):
    abstract = "spike" not in _SHOWN
    plan = "spike"
