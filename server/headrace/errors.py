"""Every error Headrace raises on purpose, in one tree split by whose fault it is.

The codes are gRPC's canonical names but import nothing of gRPC: transports translate them, in one table (rpc/status.py).
"""

from __future__ import annotations

import enum


class Code(enum.Enum):
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class HeadraceError(Exception):
    """Base of all. `str(error)` is safe to send to a client."""

    code = Code.INTERNAL


# -- the client's fault ------------------------------------------------------------------------------------------------


class ClientError(HeadraceError):
    code = Code.INVALID_ARGUMENT


class InvalidRequest(ClientError):
    """The request is malformed or does not fit the model's signature."""


class NotFound(ClientError):
    """No model or version of that name."""

    code = Code.NOT_FOUND


class AlreadyExists(ClientError):
    code = Code.ALREADY_EXISTS


class FailedPrecondition(ClientError):
    """The call is well formed, but the state it needs is not there."""

    code = Code.FAILED_PRECONDITION


class Forbidden(ClientError):
    """The call is known, but not for this caller."""

    code = Code.PERMISSION_DENIED


class Unsupported(ClientError):
    """A part of the protocol that this server, or this model, does not offer."""

    code = Code.UNIMPLEMENTED


class Cancelled(ClientError):
    """The client went away. Nobody reads this answer; it exists so that every ticket is settled."""

    code = Code.CANCELLED


# -- capacity ----------------------------------------------------------------------------------------------------------


class CapacityError(HeadraceError):
    code = Code.UNAVAILABLE


class QueueFull(CapacityError):
    """The model's queue is at its bound. Triton's clients retry on UNAVAILABLE, so not RESOURCE_EXHAUSTED."""


class QueueTimeout(CapacityError):
    """The request's own `timeout` passed while it was queued; UNAVAILABLE as in Triton."""


class DeadlineExceeded(CapacityError):
    """The call's gRPC deadline passed, or cannot be met any more."""

    code = Code.DEADLINE_EXCEEDED


class MessageTooLarge(CapacityError):
    """A message beyond max_message_bytes; gRPC's own code for it."""

    code = Code.RESOURCE_EXHAUSTED


class NotReady(CapacityError):
    """The model or version exists but does not serve now."""


class ShuttingDown(NotReady):
    pass


# -- ours --------------------------------------------------------------------------------------------------------------


class ServerError(HeadraceError):
    code = Code.INTERNAL


class BackendError(ServerError):
    """A model failed while it ran. Fails exactly its batch."""


class DeviceLost(BackendError):
    """The device, not the model, failed: nothing runs on it any more until the process is started anew."""


class LoadError(ServerError):
    """A version could not be made live; the text is the reason shown in the repository index."""


class ConfigError(HeadraceError):
    """A configuration value is missing, unknown or out of range. Names the file or flag and the key."""

    code = Code.INVALID_ARGUMENT
