"""Models, events and sources as `headrace models` shows them: descriptions in, text for rich out. Pure; `now` is given.

Everything that comes from elsewhere (names, reasons) is put in as plain text: it holds no markup and steers no terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from headrace.lifecycle.events import SERVER, Event
from headrace.lifecycle.view import ModelDescription, RolloutDescription, SourceDescription, VersionDescription

_GOOD, _MOVING, _BAD, _QUIET = "green", "yellow", "red", "dim"

STYLES = {
    "live": _GOOD, "promoted": _GOOD, "passed": _GOOD, "source_recovered": _GOOD,
    "discovered": _MOVING, "fetching": _MOVING, "verifying": _MOVING, "loading": _MOVING, "warming": _MOVING, "draining": _MOVING,
    "unloading": _MOVING, "running": _MOVING, "rollout": _MOVING, "traffic": _MOVING,
    "failed": _BAD, "rolled back": _BAD, "rolled_back": _BAD, "error": _BAD, "source_error": _BAD, "device_lost": _BAD,
    "unloaded": _QUIET, "offered": _QUIET, "superseded": _QUIET,
}  # fmt: skip
"""By state, phase of a rollout, and kind of event. Colour repeats what the word says, so that nothing is lost without it."""


def model_table(models: Sequence[ModelDescription], now: float) -> RenderableType:
    """A row a version, and below them the reasons, for which no column would be wide enough.

    A model without versions, and one that its source cannot offer, have a row too.
    """
    rows = [row for model in models for row in _model_rows(model, now)]
    if not rows:
        return Text("no models", _QUIET)
    columns = [
        _left("model"),
        _right("version"),
        Column("state", no_wrap=True),
        _left("labels"),
        *map(_right, ("traffic", "requests", "since")),
    ]
    parts: list[RenderableType] = [_table(columns, rows)]
    reasons = [reason for model in models for reason in _reasons(model)]
    if reasons:
        parts += [Text(""), _fields(*reasons)]
    return Group(*parts)


def _model_rows(model: ModelDescription, now: float) -> Iterator[list[Text]]:
    for version in model.versions:
        yield [
            plain(model.name),
            Text(str(version.version)),
            _word(version.state),
            Text(", ".join(version.labels)),
            Text(_traffic(model, version)),
            Text(f"{version.requests:,}" if version.requests else ""),
            Text(f"{span(now - version.since)} ago" if version.since else ""),
        ]
    if model.error or not model.versions:
        yield [plain(model.name), Text("-"), _word("error"), *(Text("") for _ in range(4))]


def _reasons(model: ModelDescription) -> Iterator[tuple[str, Text]]:
    for version in model.versions:
        if version.reason:
            yield f"{model.name}:{version.version}", Text.assemble(_word(version.state), ": ", plain(version.reason))
    if model.error or not model.versions:
        yield model.name, Text.assemble(_word("error"), ": ", plain(model.error or "no version is offered"))


def _traffic(model: ModelDescription, version: VersionDescription) -> str:
    """Of the requests that name no version; what a version on trial gets says by what right."""
    rollout = model.rollout
    if rollout is not None and rollout.candidate == version.version and rollout.mode != "probation":
        return f"{rollout.mode} {rollout.percent:g} %"
    return f"{version.traffic:g} %" if version.traffic else ""


# -- one model ---------------------------------------------------------------------------------------------------------


def model_page(model: ModelDescription, history: Sequence[Event], now: float) -> RenderableType:
    """Everything that is known of it."""
    parts: list[RenderableType] = [Text(printable(model.name), "bold")]
    parts.append(
        _fields(
            ("source", plain(model.source)),
            ("version policy", plain(model.version_policy)),
            ("labels", plain(_pairs(model.labels))),
            ("error", Text(printable(model.error), _BAD)),
        )
    )
    if model.rollout is not None:
        parts += _section("rollout", *_rollout(model.rollout, now))
    for version in model.versions:
        title = f"version {version.version}" + (" (default)" if version.is_default else "")
        parts += _section(title, _version(model, version, now))
    if history:
        parts += _section("history", event_table(history))
    return Group(*parts)


def _version(model: ModelDescription, version: VersionDescription, now: float) -> RenderableType:
    since = f", since {moment(version.since)} ({span(now - version.since)} ago)" if version.since else ""
    failures = f", {version.failures:,} failed" if version.failures else ""
    return _fields(
        ("state", Text.assemble(_word(version.state), since)),
        ("reason", plain(version.reason)),
        ("labels", Text(", ".join(version.labels))),
        ("traffic", Text(_traffic(model, version))),
        ("requests", Text(f"{version.requests:,}{failures}" if version.requests or version.failures else "")),
        ("load time", Text(f"{version.load_seconds:.2f} s" if version.load_seconds else "")),
        ("memory", Text(size(version.memory_bytes) if version.memory_bytes else "")),
        ("location", plain(version.location)),
        ("token", plain(version.token)),
        ("digest", plain(version.digest)),
        ("metadata", plain(_pairs(version.metadata))),
    )


def _rollout(rollout: RolloutDescription, now: float) -> Iterator[RenderableType]:
    left = f", at least {span(rollout.seconds_left)} left" if rollout.seconds_left > 0 and rollout.phase == "running" else ""
    yield _fields(
        ("phase", Text.assemble(_word(rollout.phase), f", since {moment(rollout.began)} ({span(now - rollout.began)} ago){left}")),
        ("mode", Text(rollout.mode + ("" if rollout.mode == "probation" else f", {rollout.percent:g} % of the requests"))),
        ("versions", Text(f"{rollout.candidate} on trial against {rollout.baseline}")),
        ("requests", Text(f"{rollout.requests:,} of at least {rollout.min_requests:,}")),
        ("reason", plain(rollout.reason)),
    )
    if rollout.evidence:
        columns = [_left("evidence"), _right(f"version {rollout.candidate}"), _right(f"version {rollout.baseline}")]
        yield _table(columns, ([plain(cell) for cell in row] for row in rollout.evidence))


# -- events and sources ------------------------------------------------------------------------------------------------


def event_table(events: Iterable[Event]) -> Table:
    columns = [_left("time"), _right("number"), Column("event", no_wrap=True), _right("version"), _left("by"), _wide("what")]
    return _table(
        columns,
        (
            [
                Text(moment(event.at), no_wrap=True),
                Text(str(event.number)),
                _word(event.kind),
                Text(str(event.version or "")),
                plain("" if event.who == SERVER else event.who),
                plain(_what(event)),
            ]
            for event in events
        ),
    )


def event_line(event: Event, missed: int) -> Text:
    """One line, for a stream that has no widths; `missed` events before it were lost."""
    line = Text()
    if missed:
        line.append(f"{missed} events were lost here: they came faster than they were read\n", _MOVING)
    line.append(moment(event.at), _QUIET)
    line.append(f"  {event.kind:<12}", STYLES.get(event.kind, ""))
    subject = event.model + (f":{event.version}" if event.version else "")
    line.append(f"  {printable(subject) or '-'}")
    if event.who != SERVER:
        line.append(f"  by {printable(event.who)}")
    what = _what(event)
    line.append(f"  {printable(what)}" if what else "")
    return line


_FILES = {"token", "location", "digest"}
"""What an event says of the files; they fill lines, and `show` and JSON have them."""


def _what(event: Event) -> str:
    reason = "" if event.reason == event.kind else event.reason
    fields = {key: value for key, value in event.fields.items() if key not in _FILES}
    return "; ".join(part for part in (reason, _pairs(fields)) if part)


def source_table(sources: Sequence[SourceDescription]) -> RenderableType:
    if not sources:
        return Text("no sources are watched: models are loaded by request", _QUIET)
    columns = [_left("source"), Column("state", no_wrap=True), _right("listed")]
    if any(source.error for source in sources):
        columns.append(_wide("reason"))
    rows = (
        [plain(source.uri), _word("error" if source.error else "ok"), Text(f"{span(source.age)} ago"), plain(source.error)][: len(columns)]
        for source in sources
    )
    return _table(columns, rows)


# -- parts -------------------------------------------------------------------------------------------------------------


def _table(columns: Iterable[Column], rows: Iterable[Sequence[Text]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def _left(header: str) -> Column:
    return Column(header, overflow="fold")


def _wide(header: str) -> Column:
    """What is left of the width; nothing in it is cut off."""
    return Column(header, ratio=1, overflow="fold")


def _right(header: str) -> Column:
    return Column(header, justify="right", no_wrap=True)


def _word(word: str) -> Text:
    return Text(printable(word), STYLES.get(word, ""), no_wrap=True)


def _fields(*fields: tuple[str, Text]) -> Table:
    """Those that say something."""
    table = Table(Column(no_wrap=True, style=_QUIET), Column(ratio=1, overflow="fold"), box=None, show_header=False, pad_edge=False)
    for name, value in fields:
        if value.plain:
            table.add_row(printable(name), value)
    return table


def _section(title: str, *content: RenderableType) -> list[RenderableType]:
    return [Text(""), Text(title, "bold"), *(Padding(part, (0, 0, 0, 2)) for part in content)]


def _pairs(pairs: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(pairs.items()) if value != "")


def plain(text: str) -> Text:
    return Text(printable(text), overflow="fold")


def printable(text: str) -> str:
    """Without what would steer the terminal or break the line."""
    return "".join(c if c.isprintable() else " " for c in text)


def moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def span(seconds: float) -> str:
    """In its largest unit, as people say it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
