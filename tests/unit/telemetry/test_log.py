from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from headrace.telemetry.log import configure_logging, get_logger

log = get_logger("headrace.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def configured(format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(format, level, stream)
    return stream


def events(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail() -> None:
    raise ValueError("two\nlines")


def test_json_has_one_object_a_line_with_the_common_fields_first() -> None:
    stream = configured("json")
    log.info("version live", model='a"b', version=3, seconds=0.25)
    (event,) = events(stream)
    assert list(event) == ["ts", "level", "event", "logger", "model", "version", "seconds"]
    assert list(event.values())[1:] == ["info", "version live", "headrace.test", 'a"b', 3, 0.25]


def test_timestamps_are_utc_in_iso_8601() -> None:
    stream = configured("json")
    log.info("version live")
    when = datetime.fromisoformat(str(events(stream)[0]["ts"]))
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)


def test_records_of_the_standard_library_come_in_the_same_form() -> None:
    stream = configured("json")
    logging.getLogger("asyncio").warning("task took %.1f seconds", 1.5)
    (event,) = events(stream)
    assert list(event.values())[1:] == ["warning", "task took 1.5 seconds", "asyncio"]


@pytest.mark.parametrize("logger", [log, logging.getLogger("grpc")], ids=["ours", "standard"])
def test_an_exception_is_one_field(logger: logging.Logger) -> None:
    stream = configured("json")
    try:
        fail()
    except ValueError:
        logger.exception("batch failed")
    (event,) = events(stream)
    assert event["level"] == "error"
    assert str(event["exception"]).startswith("Traceback")
    assert str(event["exception"]).endswith("ValueError: two\nlines")


def test_console_in_a_pipe_is_logfmt_in_one_line() -> None:
    stream = configured("console")
    try:
        fail()
    except ValueError:
        log.exception("batch failed", requests=3, is_warm=True)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert 'level=error event="batch failed" logger=headrace.test requests=3 is_warm=true exception="Traceback' in text


def test_a_clients_string_cannot_forge_a_line_or_steer_the_terminal() -> None:
    stream = configured("console")
    log.info("call failed", request_id="x\r\nlevel=error event=forged\x1b[2J")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert not set(text) & {"\r", "\x1b"}


def test_on_a_terminal_auto_is_for_people() -> None:
    stream = Terminal()
    configure_logging("auto", "info", stream)
    log.info("version live", model="mlp")
    assert "version live" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


def test_tracebacks_on_a_terminal_show_no_locals() -> None:
    stream = Terminal()
    configure_logging("auto", "info", stream)
    payload = "-".join(["rather", "private"])
    try:
        fail()
    except ValueError:
        log.exception("batch failed")
    assert "ValueError: two" in stream.getvalue()
    assert payload not in stream.getvalue()


def test_elsewhere_auto_is_json() -> None:
    stream = configured("auto")
    log.info("version live")
    assert events(stream)[0]["event"] == "version live"


def test_events_below_the_level_are_not_written() -> None:
    stream = configured("json", level="warning")
    log.info("version live")
    logging.getLogger("aiohttp").info("hello")
    log.warning("directory ignored")
    assert [event["event"] for event in events(stream)] == ["directory ignored"]


def test_a_logger_used_before_follows_a_new_configuration() -> None:
    first = configured("json")
    log.info("one")
    second = configured("json")
    log.info("two")
    assert [event["event"] for event in events(first)] == ["one"]
    assert [event["event"] for event in events(second)] == ["two"]


def test_warnings_are_events() -> None:
    stream = configured("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old option", stacklevel=1)
    (event,) = events(stream)
    assert event["logger"] == "py.warnings"
    assert "old option" in str(event["event"])


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="expected auto, console or json, got 'xml'"):
        configure_logging("xml", "info", io.StringIO())


def test_importing_configures_nothing() -> None:
    code = "import logging, headrace.telemetry.log; assert not logging.root.handlers"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_structlogs_global_configuration_is_left_to_whoever_embeds_us() -> None:
    stream = configured("json")
    log.info("version live")
    assert events(stream)[0]["event"] == "version live"
    assert not structlog.is_configured()
