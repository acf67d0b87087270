"""From a request and its call to a ticket: validation, priority and the time after which nobody wants the answer. Pure.

A deadline is the smallest of the call's, the `timeout` that the request names and the model's slo. The model's default_timeout is
Triton's, which bounds the queue alone: a configuration that works there has it far below what a batch takes.
"""

from __future__ import annotations

from headrace.backends.processing import classes_of
from headrace.batching.device_inputs import bring_to_host
from headrace.config import BatchingConfig
from headrace.errors import InvalidRequest, Unsupported
from headrace.lifecycle.value_checks import ValueChecks
from headrace.requests import Alike, Destinations, InferRequest, InputTensor, Parameters, Reply, RequestedOutput, Ticket, TopClasses
from headrace.signature import Signature, TensorSpec
from headrace.wire.classification import CLASSIFICATION, RANKABLE
from headrace.wire.shared_memory import REGION

NEVER = float("inf")
_KNOWN_TRITON_PARAMETERS = frozenset({"triton_enable_empty_final_response", "triton_final_response"})


def make_ticket(
    signature: Signature,
    batching: BatchingConfig,
    request: InferRequest,
    reply: Reply,
    arrived: float,
    checks: ValueChecks | None = None,
) -> Ticket:
    """Raises InvalidRequest and Unsupported. `arrived` and the reply's deadline are on one monotonic clock.

    Waits for a device, and may raise BackendError, where inputs lie on one and their values are to be checked.
    """
    admission = signature.validate(request)
    if checks is not None:
        if request.on_device:
            bring_to_host(request.inputs)
        checks.look_at(admission.inputs(request), request.id)
    priority, answer_by = _terms(batching, request, arrived)
    if reply.deadline is not None and reply.deadline < answer_by:
        answer_by = reply.deadline
    expires = min(answer_by, arrived + batching.default_timeout) if batching.default_timeout else answer_by
    rows, key, reordered, outputs = admission
    if request.on_device:
        # In batches of their own, so that whether a batch has any is known from its first.
        key = ("on device", key)
    inputs = request.inputs if reordered is None else reordered
    is_bound = bool(request.version)
    destinations = _destinations(signature, request, outputs) if request.outputs else None
    # By position: keywords make it half as dear again.
    return Ticket(
        reply, rows, key, inputs, outputs, request.id, priority, expires, answer_by, arrived, is_bound, destinations, request.on_device,
    )  # fmt: skip


def make_tickets(signature: Signature, batching: BatchingConfig, alike: Alike, arrived: float) -> list[Ticket]:
    """As `make_ticket` of each. Raises what that would raise for each of them."""
    first = alike.first
    rows, key, reordered, outputs = signature.validate(first)
    if reordered is not None:
        return [make_ticket(signature, batching, request, reply, arrived) for request, reply in alike.calls()]
    priority, latest = _terms(batching, first, arrived)
    destinations = _destinations(signature, first, outputs)
    must_start = arrived + batching.default_timeout if batching.default_timeout else NEVER
    is_bound = bool(first.version)
    tensor = first.inputs[0]
    name, datatype, shape, parameters = tensor.name, tensor.datatype, tensor.shape, tensor.parameters
    tickets = []
    for content, reply in zip(alike.contents, alike.replies, strict=True):
        deadline = reply.deadline
        answer_by = latest if deadline is None or deadline > latest else deadline
        inputs = (InputTensor(name, datatype, shape, content, parameters),)
        tickets.append(
            Ticket(
                reply, rows, key, inputs, outputs, "", priority,
                answer_by if answer_by < must_start else must_start, answer_by, arrived, is_bound, destinations,
            )
        )  # fmt: skip
    return tickets


def _terms(batching: BatchingConfig, request: InferRequest, arrived: float) -> tuple[int, float]:
    """Priority, and when it must be answered but for the call's own deadline. Raises for what cannot be granted."""
    answer_by = arrived + batching.slo if batching.slo else NEVER
    if not request.parameters:
        return batching.default_priority_level, answer_by
    _check_reserved(request.parameters)
    priority = _priority(request.parameters, batching)
    timeout = _timeout(request.parameters, batching)
    return priority, min(answer_by, arrived + timeout) if timeout else answer_by


def _destinations(signature: Signature, request: InferRequest, indexes: tuple[int, ...]) -> Destinations | None:
    """Where and how each output goes that is asked for; None where all go into the answer as they are. `indexes`: the outputs'."""
    for output in request.outputs:
        if output.parameters and CLASSIFICATION in output.parameters:
            break
    else:
        return request.destinations
    placed = request.destinations or (None,) * len(indexes)
    specs = [signature.outputs[index] for index in indexes]
    return tuple(
        [
            _top_classes(signature, spec, output) if CLASSIFICATION in output.parameters else where
            for spec, output, where in zip(specs, request.outputs, placed, strict=True)
        ]
    )


def _top_classes(signature: Signature, spec: TensorSpec, output: RequestedOutput) -> TopClasses:
    """Ignoring what a client asks of an output would give it another tensor than it expects. Texts are Triton's."""
    subject, count = f"output '{spec.name}'", output.parameters[CLASSIFICATION]
    if REGION in output.parameters:
        raise InvalidRequest(f"{subject}: expected '{CLASSIFICATION}' or '{REGION}', got both")
    if isinstance(count, bool) or not isinstance(count, int):
        raise InvalidRequest(f"{subject}: invalid value type for '{CLASSIFICATION}' parameter, expected int64_param, got {count!r}")
    if count <= 0:
        raise InvalidRequest(f"{subject}: invalid value for '{CLASSIFICATION}' parameter, expected > 0, got {count}")
    if spec.is_ranked:
        source = next(each.name for each in signature.outputs if each.is_ranked and spec.name in (each.name, classes_of(each.name)))
        raise Unsupported(f"{subject}: it is ranked already; ask for the tensors '{source}' and '{classes_of(source)}'")
    if spec.datatype not in RANKABLE:
        raise InvalidRequest(
            f"{subject}: class result not available for output due to unsupported type '{spec.datatype.value}'; "
            "expected integers, FP32 or FP64"
        )
    return TopClasses(count, signature.is_batching)


def _check_reserved(parameters: Parameters) -> None:
    for name in parameters:
        if name.startswith("triton_") and name not in _KNOWN_TRITON_PARAMETERS:
            raise InvalidRequest(
                f"parameter '{name}' uses the reserved prefix 'triton_'; expected none or a parameter the protocol defines"
            )


def _priority(parameters: Parameters, batching: BatchingConfig) -> int:
    """1 is the most urgent; 0 and anything beyond the levels mean the default (Triton's rule)."""
    given = parameters.get("priority", 0)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidRequest(f"parameter 'priority': expected an integer >= 0, got {given!r}")
    return given if 0 < given <= batching.priority_levels else batching.default_priority_level


def _timeout(parameters: Parameters, batching: BatchingConfig) -> float:
    """The `timeout` parameter in microseconds, as seconds; 0: none. The protocol: a request that cannot be completed within it may
    be ended. Triton ignores it where the model has no default timeout; its users keep asking why (server issue 7532)."""
    given = parameters.get("timeout", 0)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidRequest(f"parameter 'timeout': expected microseconds as an integer >= 0, got {given!r}")
    return given / 1e6 if batching.allow_timeout_override else 0.0
