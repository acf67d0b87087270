"""What RepositoryModelLoad and Unload are asked for, read and checked; the texts are Triton's where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from headrace.config import ModelConfig
from headrace.errors import ConfigError, InvalidRequest, ServerError, Unsupported
from headrace.sources.base import is_version_name
from headrace.wire import messages as pb
from headrace.wire.config_pbtxt import parse_config_json

CONFIG = "config"
FILE = "file:"
DEPENDENTS = "unload_dependents"
PARENTS = ("", ".", "..")


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """`config` as it was sent; `files` by their path in the model's directory."""

    model: str
    config: str | None
    files: Mapping[str, bytes]

    def read_config(self) -> ModelConfig | None:
        """Raises InvalidRequest for a configuration that cannot be honoured, ServerError for files without one."""
        problem = f"failed to load '{self.model}', failed to poll from model repository"
        if self.config is None:
            if self.files:
                raise ServerError(problem)
            return None
        try:
            config = parse_config_json(self.config, f"parameter '{CONFIG}'", self.model)
        except ConfigError as error:
            raise InvalidRequest(f"{problem}: {error}") from None
        if config.name != self.model:
            raise InvalidRequest(f"{problem}: parameter '{CONFIG}': expected name '{self.model}' or none, got '{config.name}'")
        return config


def read_load(request: pb.RepositoryModelLoadRequest) -> LoadOrder:
    """Raises Unsupported, InvalidRequest."""
    _check_repository(request.repository_name)
    config = None
    files = {}
    for key, value in sorted(request.parameters.items()):
        kind = value.WhichOneof("parameter_choice")
        if key == CONFIG:
            _check_kind(f"load parameter '{key}'", kind, "string_param")
            config = value.string_param
        elif key.startswith(FILE):
            _check_kind(f"load parameter '{key}'", kind, "bytes_param")
            files[_check_path(key)] = value.bytes_param
        else:
            raise InvalidRequest(f"unrecognized load parameter '{key}'.")
    for path in files:
        for parent in PurePosixPath(path).parents:
            if str(parent) in files:
                raise InvalidRequest(f"load parameter '{FILE}{parent}': expected a file or a directory, got both ('{path}')")
    return LoadOrder(_check_model(request.model_name), config, files)


def read_unload(request: pb.RepositoryModelUnloadRequest) -> bool:
    """Whether the models that it is made of go too. Other parameters are passed over, as Triton does. Raises as `read_load`."""
    _check_repository(request.repository_name)
    if DEPENDENTS not in request.parameters:
        return False
    value = request.parameters[DEPENDENTS]
    _check_kind(f"'{DEPENDENTS}' parameter", value.WhichOneof("parameter_choice"), "bool_param")
    return value.bool_param


def _check_repository(name: str) -> None:
    if name:
        raise Unsupported("'repository_name' specification is not supported")


def _check_kind(subject: str, kind: str | None, expected: str) -> None:
    if kind != expected:
        raise InvalidRequest(f"invalid value type for {subject}, expected {expected}.")


def _check_model(name: str) -> str:
    """It becomes the name of a directory."""
    if name in PARENTS or any(part in name for part in "/\\\0"):
        raise InvalidRequest(f"model name: expected one without path separators, got {name!r}")
    return name


def _check_path(key: str) -> str:
    path = key.removeprefix(FILE)
    version, *names = path.split("/")
    if not is_version_name(version) or not names or any(name in PARENTS for name in names) or any(part in path for part in "\\\0"):
        raise InvalidRequest(f"load parameter {key!r}: expected '{FILE}<version number>/<name>' that stays in the version's directory")
    return path
