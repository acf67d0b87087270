"""Reading what lies beside a model: model.toml or config.pbtxt, and label files. Blocking; never on the event loop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from headrace.config import ModelConfig
from headrace.config_loading import load_model_toml, parse_model_toml
from headrace.drift.reference import Reference
from headrace.drift.reference_file import FILENAME, MOST_BYTES, check_fits, decode
from headrace.errors import ConfigError, LoadError
from headrace.signature import Signature
from headrace.wire.config_pbtxt import parse_config_pbtxt

CONFIG_FILES = ("model.toml", "config.pbtxt")


def model_name(directory: Path) -> str:
    """The directory's own name, also where that is a symbolic link to a differently named one, or was given as '.'."""
    return Path(os.path.abspath(directory)).name


def load_model_config(directory: Path, name: str) -> ModelConfig:
    """model.toml, or a Triton config.pbtxt, or the defaults. Both at once is an error: one would be ignored silently."""
    toml, pbtxt = directory / "model.toml", directory / "config.pbtxt"
    if toml.exists() and pbtxt.exists():
        raise ConfigError(f"model '{name}' has both model.toml and config.pbtxt; expected one of them")
    if toml.exists():
        return load_model_toml(toml, name)
    if pbtxt.exists():
        return _parse_pbtxt(_read_text(pbtxt, f"{name}/{pbtxt.name}"), name)
    return ModelConfig(name)


def parse_model_config(files: Mapping[str, bytes], name: str) -> ModelConfig:
    """What `load_model_config` makes of these files, by name, where they are not on this machine's disk."""
    if set(CONFIG_FILES) <= set(files):
        raise ConfigError(f"model '{name}' has both model.toml and config.pbtxt; expected one of them")
    if "model.toml" in files:
        return parse_model_toml(files["model.toml"], name)
    if "config.pbtxt" in files:
        try:
            text = files["config.pbtxt"].decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}/config.pbtxt: expected UTF-8, byte {error.start} is not") from None
        return _parse_pbtxt(text, name)
    return ModelConfig(name)


def _parse_pbtxt(text: str, name: str) -> ModelConfig:
    place = f"{name}/config.pbtxt"
    config = parse_config_pbtxt(text, place, name)
    if config.name != name:
        raise ConfigError(f"{place}: expected name '{name}' as its directory, got '{config.name}'")
    return config


def load_labels(directory: Path, filename: str) -> tuple[str, ...]:
    """One class name a line, the first for index 0; an empty line is a class without a name.

    The file must lie inside the model's directory: a configuration must not be a way to read the rest of the machine.
    """
    path = (directory / filename).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ConfigError(f"labels file '{filename}': expected a file inside the model's directory")
    if not path.is_file():
        raise ConfigError(f"labels file '{filename}': not found in the model's directory")
    return tuple(_read_text(path, f"labels file '{filename}'").removesuffix("\n").split("\n"))


def _read_text(path: Path, place: str) -> str:
    """Line ends as \\n. Raises ConfigError with `place` for what cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: expected UTF-8, byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}") from None


def read_reference(directory: Path, signature: Signature) -> Reference | None:
    """The drift reference in a version's directory, None where there is none. Raises LoadError for one that is damaged or of another
    model: what is compared with it would be wrong, and the version before serves on."""
    try:
        with (directory / FILENAME).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"{FILENAME}: {error.strerror}") from None
    reference = decode(data)
    check_fits(reference, signature)
    return reference
