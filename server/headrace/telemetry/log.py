"""One line an event, for people or for machines. Called by the command line only; importing configures nothing.

Everything goes through the standard library's root logger, so that what grpc, asyncio, aiohttp and `warnings` say comes out
in the same form as our own events.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_FIRST = ("ts", "level", "event", "logger")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) not in "\t\n"}
"""A client's string, such as a request id, must not steer a terminal or end a line. The renderer itself escapes \\n."""


_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    structlog.processors.StackInfoRenderer(),
)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger over the standard library's of that name, with its processors fixed: structlog's global configuration, which
    belongs to the application that embeds us and prints to stdout unless it is set, is left alone."""
    return cast(
        structlog.stdlib.BoundLogger,
        structlog.wrap_logger(
            logging.getLogger(name),
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.PositionalArgumentsFormatter(),
                *_SHARED,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
        ),
    )


def configure_logging(format: str, level: str, stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (stderr) in place of the root logger's handlers; call again to change it.

    `format`: 'console' (logfmt; colours and readable tracebacks on a terminal), 'json', or 'auto': console on a terminal, else
    JSON. `level`: the name of the least level that is logged.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=_renderers(format, stream)))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # Each attempt to reach a collector that is away; that spans are lost stays an error.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    # It tells of each batch of changes; what comes of them is told by us.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)


def _renderers(format: str, stream: TextIO) -> list[Processor]:
    """What turns an event into text. Cases: json; console on a terminal; console into a file or pipe."""
    if format not in ("auto", "console", "json"):
        raise ValueError(f"log format: expected auto, console or json, got {format!r}")
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    is_terminal = stream.isatty()
    if format == "json" or (format == "auto" and not is_terminal):
        return [remove, structlog.processors.format_exc_info, _order, structlog.processors.JSONRenderer(default=str)]
    if is_terminal:
        plain = structlog.dev.plain_traceback  # the richer ones print the locals: tensors, for pages
        return [remove, structlog.dev.ConsoleRenderer(colors=True, timestamp_key="ts", exception_formatter=plain)]
    logfmt = structlog.processors.LogfmtRenderer(key_order=_FIRST, drop_missing=True, bool_as_flag=False)
    return [remove, structlog.processors.format_exc_info, _escape_control, logfmt]


def _order(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    first = {key: event.pop(key) for key in _FIRST if key in event}
    return {**first, **event}


def _escape_control(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    return {key: value.translate(_CONTROL) if isinstance(value, str) else value for key, value in event.items()}
