"""Reads configuration: headrace.toml < environment < flags, and model.toml. Every key comes from config.py's declarations.

An unknown key is an error that names the nearest known one: a typing mistake must not silently mean the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from headrace.config import (
    BatchingConfig,
    CaptureConfig,
    DriftConfig,
    FeedbackConfig,
    InstanceConfig,
    ModelConfig,
    PostprocessConfig,
    PreprocessConfig,
    RolloutConfig,
    ServerConfig,
    TensorConfig,
)
from headrace.errors import ConfigError

ENVIRONMENT_PREFIX = "HEADRACE_"

KUBERNETES_VARIABLE = re.compile(r"HEADRACE_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_[A-Z]+(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes puts into every pod beside a Service named `headrace`; nobody meant to configure us with it."""


def load_server_config(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> ServerConfig:
    """`flags`: key -> value (a str, or a list of str for lists), only those given. Raises ConfigError naming the source and key."""
    keys = option_keys(ServerConfig)
    values: dict[str, Any] = {}
    if file is not None:
        table = _read_toml(file)
        for key in table:
            if key in keys and keys[key].metadata["secret"]:
                raise ConfigError(f"{file}: {key}: a secret; expected it in the environment, as {ENVIRONMENT_PREFIX}{key.upper()}")
        values.update(_read_section(ServerConfig, table, str(file)))
    known = {ENVIRONMENT_PREFIX + key.upper(): key for key in keys}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == ENVIRONMENT_PREFIX + "CONFIG":
            continue
        if variable in known:
            option = keys[known[variable]]
            values[option.name] = _from_text(option, text, variable)
        elif not KUBERNETES_VARIABLE.fullmatch(variable):
            raise ConfigError(f"environment: unknown variable {variable}{_nearest(variable, known)}")
    for key, given in flags.items():
        option = keys[key]
        values[option.name] = _from_text(option, given, "--" + key.replace("_", "-"))
    return ServerConfig(**values)


def load_model_toml(path: Path, name: str) -> ModelConfig:
    """Raises ConfigError naming the file and the key."""
    return _build_model(_read_toml(path), name)


def parse_model_toml(raw: bytes, name: str) -> ModelConfig:
    """The same from a model.toml that is not on this machine's disk."""
    return _build_model(_parse_toml(raw, f"{name}/model.toml"), name)


def _build_model(table: dict[str, Any], name: str) -> ModelConfig:
    where = f"{name}/model.toml"
    origins = dict.fromkeys(table, "model.toml")
    instances = _read_section(InstanceConfig, _pop_table(table, "instances", where), f"{where} [instances]")
    inputs = tuple(_read_tensor(t, f"{where} [[input]]") for t in _pop_tables(table, "input", where))
    outputs = tuple(_read_tensor(t, f"{where} [[output]]") for t in _pop_tables(table, "output", where))
    preprocess = [_read_step(PreprocessConfig, t, f"{where} [[preprocess]]", "input") for t in _pop_tables(table, "preprocess", where)]
    postprocess = [_read_step(PostprocessConfig, t, f"{where} [[postprocess]]", "output") for t in _pop_tables(table, "postprocess", where)]
    labels = read_labels(_pop_table(table, "labels", where), f"{where} [labels]")
    rollout = _read_section(RolloutConfig, _pop_table(table, "rollout", where), f"{where} [rollout]")
    drift = _read_section(DriftConfig, _pop_table(table, "drift", where), f"{where} [drift]")
    capture = _read_section(CaptureConfig, _pop_table(table, "capture", where), f"{where} [capture]")
    feedback = _read_section(FeedbackConfig, _pop_table(table, "feedback", where), f"{where} [feedback]")
    flat = {**option_keys(ModelConfig), **option_keys(BatchingConfig)}
    tables = ("instances", "input", "output", "preprocess", "postprocess", "labels", "rollout", "drift", "capture", "feedback")
    _check_known(table, [*flat, *tables], where)
    batching = {key: table[key] for key in table if key in option_keys(BatchingConfig)}
    model = {key: table[key] for key in table if key not in batching}
    return ModelConfig(
        name,
        batching=_build(BatchingConfig, _read_section(BatchingConfig, batching, where), where),
        instances=_build(InstanceConfig, instances, f"{where} [instances]"),
        labels=labels,
        rollout=_build(RolloutConfig, rollout, where),
        drift=_build(DriftConfig, drift, f"{where} [drift]"),
        capture=CaptureConfig(**capture),
        feedback=FeedbackConfig(**feedback),
        inputs=inputs,
        outputs=outputs,
        preprocess=tuple(preprocess),
        postprocess=tuple(postprocess),
        provenance=origins,
        **_read_section(ModelConfig, model, where),
    )


def option_keys(section: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """File key -> field, for the fields that are options (those with documentation)."""
    return {field.metadata.get("key") or field.name: field for field in dataclasses.fields(section) if field.metadata}


Section = TypeVar("Section")


def _build(section: type[Section], values: Mapping[str, Any], where: str) -> Section:
    try:
        return section(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Begins with a letter, so that no label is a version number."""


def read_labels(table: Mapping[str, Any], where: str) -> dict[str, int]:
    """Raises ConfigError for a label that is none, or a version that is no number."""
    for label, version in table.items():
        if not LABEL.fullmatch(label):
            raise ConfigError(f"{where}: expected a label of letters, digits, '_', '.' and '-' that begins with a letter, got {label!r}")
        if type(version) is not int or version < 0:
            raise ConfigError(f"{where}: {label}: expected a version number, got {version!r}")
    return dict(table)


def _read_tensor(table: Mapping[str, Any], where: str) -> TensorConfig:
    tensor = TensorConfig(**_read_section(TensorConfig, table, where))
    if not tensor.name:
        raise ConfigError(f"{where}: expected a 'name'")
    return tensor


def _read_step(section: type[Section], table: Mapping[str, Any], where: str, tensor: str) -> Section:
    step = _build(section, _read_section(section, table, where), where)
    if not getattr(step, tensor):
        raise ConfigError(f"{where}: expected '{tensor}', the name of one")
    return step


def _read_section(section: type[Any], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    keys = option_keys(section)
    _check_known(table, list(keys), where)
    return {keys[key].name: _check(keys[key], value, f"{where}: {key}") for key, value in table.items()}


def _check_known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'{_nearest(key, known)}")


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _parse_toml(raw: bytes, place: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # what is wrong in the text or its encoding, or nested without end
        raise ConfigError(f"{place}: not valid TOML: {error}") from None


def _pop_table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.pop(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key}: expected a table [{key}], got {value!r}")
    return value


def _pop_tables(table: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    value = table.pop(key, [])
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise ConfigError(f"{where}: {key}: expected tables [[{key}]], got {value!r}")
    return value


# -- values ------------------------------------------------------------------------------------------------------------


def _kind(field: dataclasses.Field[Any]) -> str:
    """bool, int, float, str, 'list of str', 'list of int' or 'table'."""
    annotation = typing.get_type_hints(_owner(field))[field.name]
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return f"list of {typing.get_args(annotation)[0].__name__}"
    return "table" if origin is not None else str(annotation.__name__)


def _owner(field: dataclasses.Field[Any]) -> type[Any]:
    sections = (
        ServerConfig, BatchingConfig, InstanceConfig, TensorConfig, PreprocessConfig, PostprocessConfig, DriftConfig, CaptureConfig,
        FeedbackConfig, RolloutConfig, ModelConfig,
    )  # fmt: skip
    return next(section for section in sections if field in dataclasses.fields(section))


def _check(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """The value as the dataclass wants it. Raises ConfigError with what was expected and what came."""
    kind = _kind(field)
    if kind.startswith("list of "):
        if kind == "list of float" and type(value) in (int, float):
            value = [value]
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a {kind}, got {value!r}")
        return tuple(_check_one(field, each, kind.removeprefix("list of "), where) for each in value)
    if kind == "table":
        if not isinstance(value, dict) or any(isinstance(each, (dict, list)) for each in value.values()):
            raise ConfigError(f"{where}: expected a table of plain values, got {value!r}")
        return {key: str(each).lower() if isinstance(each, bool) else str(each) for key, each in value.items()}
    return _check_one(field, value, kind, where)


def _check_one(field: dataclasses.Field[Any], value: Any, kind: str, where: str) -> Any:
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        raise ConfigError(f"{where}: expected {'an' if kind == 'int' else 'a'} {kind}, got {value!r}")
    if kind == "float" and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")
    minimum, choices = field.metadata.get("minimum"), field.metadata.get("choices")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{where}: expected at least {minimum}, got {value!r}")
    if choices and value not in choices:
        raise ConfigError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")
    return value * field.metadata["scale"] if kind == "float" else value


def _from_text(field: dataclasses.Field[Any], text: Any, where: str) -> Any:
    """From an environment variable or a flag, where everything is text and lists are separated by commas."""
    kind = _kind(field)
    if kind.startswith("list of "):
        parts = text if isinstance(text, list) else [part.strip() for part in str(text).split(",") if part.strip()]
        return _check(field, parts, where)
    if kind == "bool":
        if isinstance(text, bool) or str(text).lower() in ("true", "false", "1", "0"):
            return str(text).lower() in ("true", "1")
        raise ConfigError(f"{where}: expected true or false, got {text!r}")
    if kind in ("int", "float"):
        try:
            return _check(field, int(text) if kind == "int" else float(text), where)
        except ValueError:
            raise ConfigError(f"{where}: expected {'an' if kind == 'int' else 'a'} {kind}, got {text!r}") from None
    return _check(field, str(text), where)
