"""Reading what lies beside a model: model.toml or config.pbtxt, and label files. Blocking; never on the event loop."""

from __future__ import annotations

from pathlib import Path

from headrace.config import ModelConfig
from headrace.config_loading import load_model_toml
from headrace.errors import ConfigError
from headrace.wire.config_pbtxt import parse_config_pbtxt


def load_model_config(directory: Path, name: str) -> ModelConfig:
    """model.toml, or a Triton config.pbtxt, or the defaults. Both at once is an error: one of them would be ignored silently."""
    toml, pbtxt = directory / "model.toml", directory / "config.pbtxt"
    if toml.exists() and pbtxt.exists():
        raise ConfigError(f"model '{name}' has both model.toml and config.pbtxt; expected one of them")
    if toml.exists():
        return load_model_toml(toml, name)
    if pbtxt.exists():
        config = parse_config_pbtxt(pbtxt.read_text(encoding="utf-8"), f"{name}/config.pbtxt", name)
        if config.name != name:
            raise ConfigError(f"{name}/config.pbtxt: expected name '{name}' as its directory, got '{config.name}'")
        return config
    return ModelConfig(name)


def load_labels(directory: Path, filename: str) -> tuple[str, ...]:
    """One class name a line. The file must lie inside the model's directory."""
    path = (directory / filename).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ConfigError(f"labels file {filename!r}: expected a file inside the model's directory")
    if not path.is_file():
        raise ConfigError(f"labels file {filename!r}: not found in the model's directory")
    return tuple(line.rstrip("\r") for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
