"""`headrace models`: a running server's models, seen and changed over its admin service."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from headrace.config import check_listener
from headrace.errors import Code

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from headrace.lifecycle.events import Event
    from headrace.rpc.admin_client import AdminClient

DONE, FAILED, WRONG_USE = 0, 1, 2
DEFAULT_URL = "127.0.0.1:8001"
WIDTH = 100
"""Columns where nobody knows them: in pipes and files."""

Action = Callable[["AdminClient", argparse.Namespace, "Output"], None]


def add_models(models: argparse.ArgumentParser) -> None:
    """Give the parser of `headrace models` its subcommands."""
    common = add_client_flags()
    commands = models.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action: Action, doc: str, *, is_change: bool = False, needs_reason: bool = False) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=doc, description=doc[0].upper() + doc[1:] + ".", parents=[common])
        if is_change:
            parser.add_argument("--reason", default="", required=needs_reason, help="why; kept with the event and in the audit log")
        parser.set_defaults(run=run, action=action)
        return parser

    add("list", _list, "every model and version with its state")
    add("show", _show, "all that is known of one model").add_argument("model", metavar="MODEL")
    promote = add("promote", _promote, "end the trial of a version in its favour", is_change=True, needs_reason=True)
    promote.add_argument("model", metavar="MODEL")
    promote.add_argument(
        "--version", type=_number, default=0, metavar="N", help="left out: the one on trial; one that was rolled back is taken up again"
    )
    rollback = add("rollback", _roll_back, "give a version up for the one before it", is_change=True, needs_reason=True)
    rollback.add_argument("model", metavar="MODEL")
    label = add("label", _label, "move a label to a live version, or take it away", is_change=True)
    label.add_argument("model", metavar="MODEL")
    label.add_argument("label", metavar="LABEL")
    label.add_argument("version", type=_number_or_none, metavar="VERSION", help="a number; 0 or 'none' takes the label away")
    traffic = add("traffic", _traffic, "put a live version on trial beside the serving one", is_change=True)
    traffic.add_argument("model", metavar="MODEL")
    traffic.add_argument("version", type=_number, metavar="VERSION")
    traffic.add_argument(
        "--mode", required=True, choices=("canary", "shadow"), help="canary: it answers; shadow: it gets copies, which are compared"
    )
    traffic.add_argument("--percent", required=True, type=_percent, metavar="P", help="of the requests that name no version")
    events = add("events", _events, "what happened to models, with who and why")
    events.add_argument("--follow", action="store_true", help="go on with what happens, until Ctrl-C or until the server stops")
    events.add_argument("--model", default="", metavar="MODEL", help="of this one only")
    add("sources", _sources, "where models come from, and whether that can be read")


def add_client_flags(url: str = DEFAULT_URL) -> argparse.ArgumentParser:
    """A parent for parsers of commands that ask a server."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default=url, metavar="ADDRESS", help="the server's gRPC address, HOST:PORT or unix:PATH" + (f" ({url})" if url else "")
    )
    common.add_argument("--json", action="store_true", help="for machines")
    common.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="how long to wait for an answer (60)")
    common.add_argument("--tls-ca", default="", metavar="PEM", help="authorities that the server's certificate is checked against; TLS")
    common.add_argument("--tls-certificate", default="", metavar="PEM", help="certificate to show to the server (mutual TLS)")
    common.add_argument("--tls-key", default="", metavar="PEM", help="its private key")
    return common


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a version's number, got {text!r}")
    return int(text)


def _number_or_none(text: str) -> int:
    return 0 if text == "none" else _number(text)


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def run(options: argparse.Namespace) -> int:
    return call_server(options, options.action)


def call_server(options: argparse.Namespace, action: Action) -> int:
    """The exit code. Raises ConfigError for wrong use."""
    # gRPC's own lines about a failed handshake would stand around the one that says what is wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from headrace.rpc.admin_client import AdminClient, CallFailed, Tls

    check_listener("--url", options.url)
    tls = Tls(options.tls_ca, options.tls_certificate, options.tls_key)
    output = Output(is_json=options.json)
    try:
        with AdminClient(options.url, tls, options.timeout) as client:
            action(client, options, output)
            sys.stdout.flush()
    except CallFailed as error:
        print(f"headrace: {error}", file=sys.stderr)
        return WRONG_USE if error.code is Code.INVALID_ARGUMENT else FAILED
    except BrokenPipeError:
        # Whoever read has had enough, as `head` has; what is still buffered must not fail once more at exit. rich exits with 1 too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        # The way to end `events --follow`.
        return DONE if getattr(options, "follow", False) else FAILED
    return DONE


class Output:
    """Text for people or JSON for machines, on standard output."""

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self._console: Console | None = None

    def show(self, table: object, text: Callable[[], RenderableType]) -> None:
        if self.is_json:
            print(json.dumps(table, indent=2))
        elif self.console.is_terminal:
            self.console.print(text())
        else:
            with self.console.capture() as captured:
                self.console.print(text())
            # Tables are filled up with blanks to their whole width.
            print("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def say(self, table: object, text: str) -> None:
        print(json.dumps(table) if self.is_json else text)

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
            self._console = Console(width=width, highlight=False, markup=False, emoji=False)
        return self._console


# -- looking -----------------------------------------------------------------------------------------------------------


def _list(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    from headrace.cli_tables import model_table

    models = client.list_models()
    output.show(_tables(models), lambda: model_table(models, time.time()))


def _show(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    from headrace.cli_tables import model_page

    model, history = client.describe_model(options.model)
    table = {**dataclasses.asdict(model), "history": [event.table() for event in history]}
    output.show(table, lambda: model_page(model, history, time.time()))


def _sources(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    from headrace.cli_tables import source_table

    sources = client.list_sources()
    output.show(_tables(sources), lambda: source_table(sources))


def _events(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    """A line each, as they come; with --json an object a line."""
    from headrace.cli_tables import event_line

    for event, missed in client.watch_events(options.model, is_following=options.follow):
        if output.is_json:
            print(json.dumps(_event(event, missed)), flush=True)
        else:
            output.console.print(event_line(event, missed), soft_wrap=True)
    if options.follow:
        print(f"headrace: {options.url} has stopped", file=sys.stderr)


def _event(event: Event, missed: int) -> dict[str, Any]:
    return {**event.table(), **({"missed": missed} if missed else {})}


def _tables(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]


# -- changing ----------------------------------------------------------------------------------------------------------


def _promote(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    client.promote(options.model, options.version, options.reason)
    # What was rolled back is taken up as the model's configuration says, which may be on trial once more.
    model, _ = client.describe_model(options.model)
    serving = next((version.version for version in model.versions if version.is_default), 0)
    trial = model.rollout.candidate if model.rollout is not None else 0
    text = f"{options.model}: version {serving} serves" + (f", version {trial} is on trial" if trial else "")
    output.say({"model": options.model, "version": serving or None, "on_trial": trial or None}, text)


def _roll_back(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    version = client.roll_back(options.model, options.reason)
    output.say({"model": options.model, "version": version}, f"{options.model}: rolled back, version {version} serves")


def _label(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    client.set_label(options.model, options.label, options.version, options.reason)
    what = f"names version {options.version}" if options.version else "is taken away"
    output.say(
        {"model": options.model, "label": options.label, "version": options.version or None}, f"{options.model}: '{options.label}' {what}"
    )


def _traffic(client: AdminClient, options: argparse.Namespace, output: Output) -> None:
    client.set_traffic(options.model, options.version, options.mode, options.percent, options.reason)
    gets = "answers" if options.mode == "canary" else "gets copies of"
    output.say(
        {"model": options.model, "version": options.version, "mode": options.mode, "percent": options.percent},
        f"{options.model}: version {options.version} {gets} {options.percent:g} % of the requests",
    )
