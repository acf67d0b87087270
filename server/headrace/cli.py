"""The command `headrace`. Exit codes: 0 done, 1 failed, 2 wrong use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.cli_bench import add_bench
from headrace.cli_drift import add_drift
from headrace.cli_feedback import add_feedback
from headrace.cli_health import add_health
from headrace.cli_models import add_models
from headrace.cli_replay import add_replay
from headrace.config import ServerConfig, SourceConfig
from headrace.config_loading import ENVIRONMENT_PREFIX, load_server_config, option_keys
from headrace.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.app import Server
    from headrace.backends.base import BackendRegistry
    from headrace.lifecycle.effective import EffectiveModel
    from headrace.sources.base import ModelRef, Source

DONE, FAILED, WRONG_USE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return WRONG_USE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description="A high-performance model inference server.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve models over gRPC", description="Serve models until SIGINT or SIGTERM.")
    serve.add_argument("--config", type=Path, help="headrace.toml; below environment variables and flags")
    for key, field in option_keys(ServerConfig).items():
        if not field.metadata["secret"]:
            _add_flag(serve, key, field)
    serve.set_defaults(run=_serve)
    check = commands.add_parser(
        "check", help="show what would be served, and why", description="Show every model's settings and their origin."
    )
    check.add_argument("repository", help="a directory of models, or any URI that --models takes")
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(run=_check)
    add_health(commands.add_parser("health", help="whether a server is ready: exit code 0 or 1, for probes of containers"))
    add_models(commands.add_parser("models", help="see and change the models of a running server"))
    add_drift(commands.add_parser("drift", help="references for a model's drift, and what a server has found"))
    add_bench(commands.add_parser("bench", help="find the batch sizes, instances and threads that a model does most with here"))
    add_replay(commands)
    add_feedback(commands.add_parser("feedback", help="send labels for answers that were given, and see how right they were"))
    _add_publish(commands.add_parser("publish", help="put a model into a repository as a new version, whole or not at all"))
    return parser


def _add_publish(publish: argparse.ArgumentParser) -> None:
    publish.add_argument("artifact", type=Path, metavar="MODEL", help="a model file, or the directory of a version's files")
    publish.add_argument(
        "--to", required=True, metavar="URI", help="the repository: a directory of models, s3://bucket/prefix, or mlflow:NAME@ALIAS"
    )
    publish.add_argument("--name", required=True, help="the model's name")
    publish.add_argument("--version", type=int, metavar="N", help="left out: one more than the highest there")
    publish.add_argument("--metadata", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="kept in manifest.json")
    publish.add_argument("--reference", type=Path, metavar="FILE", help="the drift reference that goes with it, kept as drift.msgpack")
    publish.add_argument("--sign", type=Path, metavar="KEY.pem", help="private key (EC, P-256) to sign the manifest with")
    publish.add_argument("--json", action="store_true", help="for machines")
    publish.set_defaults(run=_publish)


def _add_flag(parser: argparse.ArgumentParser, key: str, field: Any) -> None:
    flag = "--" + key.replace("_", "-")
    doc = f"{field.metadata['doc']} [{ENVIRONMENT_PREFIX}{key.upper()}]".replace("%", "%%")
    if field.type.startswith("tuple"):
        parser.add_argument(flag, dest=key, action="extend", nargs="+", metavar="VALUE", help=doc)
    elif field.type == "bool":
        parser.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, default=None, help=doc)
    else:
        parser.add_argument(flag, dest=key, metavar="VALUE", choices=field.metadata["choices"] or None, help=doc)


def _serve(options: argparse.Namespace) -> int:
    from headrace.app import run
    from headrace.telemetry.log import configure_logging

    flags = {key: value for key in option_keys(ServerConfig) if (value := getattr(options, key, None)) is not None}
    file = options.config or (Path(os.environ["HEADRACE_CONFIG"]) if "HEADRACE_CONFIG" in os.environ else None)
    config = load_server_config(flags, os.environ, file)
    if not config.models:
        raise ConfigError("no models: expected --models DIR, HEADRACE_MODELS or `models` in headrace.toml")
    check_runtime()
    configure_logging(config.log_format, config.log_level)
    return run(config, _greet if sys.stdout.isatty() else None)


def _greet(server: Server) -> None:
    """For a person at a terminal: what is up and what to try next."""
    address = server.grpc_addresses[0]
    models = ", ".join(sorted({version.model for version in server.models.find("", "") if version.is_live})) or "no model"
    print(f"\nHeadrace {__version__} serves {models} on {address}.")
    if server.http_address and server.config.dashboard:
        print(f"  look      http://{server.http_address}/")
    if server.http_address:
        print(f"  metrics   curl http://{server.http_address}/metrics")
        print(f"  health    curl http://{server.http_address}/readyz")
    # The interpreter that has us has the example's client library too, in the environment that make builds.
    print(f"  client    {os.path.relpath(sys.executable)} examples/client.py --url {address}")
    print("  Ctrl-C finishes what is queued and stops.\n", flush=True)


def check_runtime() -> None:
    """onnxruntime and onnxruntime-gpu install the same import package; two of them overwrite each other's files.

    Raises ConfigError when none or both are installed.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if not found:
        raise ConfigError("no ONNX Runtime is installed; expected one: pip install 'headrace[cpu]' or 'headrace[gpu]'")
    if len(found) > 1:
        raise ConfigError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "pip uninstall both, then install 'headrace[cpu]' or 'headrace[gpu]'"
        )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


# -- check -------------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    import asyncio

    check_runtime()
    try:
        results = asyncio.run(_check_source(options.repository))
    except OSError as error:
        print(f"headrace: {options.repository} cannot be read: {error.strerror or error}", file=sys.stderr)
        return FAILED
    if not results:
        print(f"headrace: no models in '{options.repository}': expected {options.repository}/<model>/1/model.onnx", file=sys.stderr)
    print(json.dumps(results, indent=2) if options.json else "\n".join(map(_format_result, results)))
    return FAILED if not results or any("error" in result for result in results) else DONE


async def _check_source(uri: str) -> list[dict[str, Any]]:
    from headrace.lifecycle.policy import select_versions
    from headrace.plugins import load_backends, open_source

    source = open_source(uri, SourceConfig())
    try:
        listing = await source.list()
        backends = load_backends()
        results: list[dict[str, Any]] = [{"model": name, "error": reason} for name, reason in listing.errors.items()]
        for model in listing.models.values():
            policy = model.config.version_policy
            numbers = select_versions(list(model.versions), policy)
            if not numbers:
                there = ", ".join(map(str, sorted(model.versions)))
                results.append({"model": model.name, "error": f"version_policy '{policy}' selects none of its versions: {there}"})
            results += [await _check_version(source, model, number, backends) for number in numbers]
        return results
    finally:
        await source.close()


async def _check_version(source: Source, model: ModelRef, number: int, backends: BackendRegistry) -> dict[str, Any]:
    import asyncio

    from headrace.lifecycle.inspection import inspect

    try:
        fetched = await source.fetch(model, number)
        try:
            effective = (await asyncio.to_thread(inspect, model.config, fetched, backends)).effective
        finally:
            fetched.release()
    except HeadraceError as error:
        return {"model": model.name, "version": number, "error": str(error)}
    return {"model": model.name, "version": number, "settings": describe(effective), "notes": list(effective.notes)}


def describe(effective: EffectiveModel) -> list[tuple[str, str, str]]:
    """(setting, value, origin) of everything that decides how a version is served."""
    origin = effective.provenance
    rows = [("backend", effective.backend, origin.get("backend", "default"))]
    rows.append(("filename", effective.filename, origin.get("filename", "the backend's default")))
    for section in (effective.batching, effective.instances):
        for key, field in option_keys(type(section)).items():
            value = getattr(section, field.name)
            if field.metadata.get("scale", 1) != 1:
                value = round(value / field.metadata["scale"], 6)
            rows.append((key, str(value), origin.get(key, "default")))
    for kind, specs in (("input", effective.signature.inputs), ("output", effective.signature.outputs)):
        for spec in specs:
            shape = ",".join(str(dim) for dim in spec.shape)
            text = f"{spec.datatype.value} [{shape}]" + (" optional" if spec.optional else "")
            rows.append((f"{kind} {spec.name}", text, origin.get(f"{kind}.{spec.name}", effective.filename)))
    return rows


def _format_result(result: dict[str, Any]) -> str:
    title = result["model"] + (f":{result['version']}" if "version" in result else "")
    if "error" in result:
        return f"{title}\n  cannot be served: {result['error']}\n"
    rows = result["settings"]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  ({origin})" for name, value, origin in rows]
    return "\n".join([title, *lines, *(f"  note: {note}" for note in result["notes"]), ""])


# -- publish -----------------------------------------------------------------------------------------------------------


def _publish(options: argparse.Namespace) -> int:
    from headrace.plugins import load_backends, open_destination
    from headrace.sources.publish import Order, publish

    metadata = dict(_read_pair(text) for text in options.metadata)
    order = Order(options.artifact, options.name, options.version, metadata, options.sign, options.reference)
    check_runtime()
    try:
        published = publish(order, open_destination(options.to, SourceConfig()), load_backends())
    except ConfigError:
        raise
    except HeadraceError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot publish {order.model}: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    except KeyboardInterrupt:
        reason = "interrupted"
    else:
        print(json.dumps(published.table(), indent=2) if options.json else published)
        return DONE
    print(f"headrace: {reason}", file=sys.stderr)
    return FAILED


def _read_pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise ConfigError(f"--metadata: expected KEY=VALUE, got {text!r}")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
