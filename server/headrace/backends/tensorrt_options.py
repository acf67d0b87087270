"""Pure: what [instances.options] says to the TensorRT backend."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from headrace.backends.tensorrt_profiles import OPTION as PROFILE_PREFIX
from headrace.errors import LoadError


def _option(default: Any, *, choices: tuple[str, ...] = (), least: int = 0, most: int | None = None) -> Any:
    return field(default=default, metadata={"choices": choices, "least": least, "most": most})


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Those that an engine is built by, and so part of its key. What is left to TensorRT is None."""

    optimization_level: int | None = _option(None, most=5)
    """More takes longer to build and may run faster; TensorRT's default is 3."""
    max_aux_streams: int | None = _option(None, most=64)
    workspace_mb: int | None = _option(None, least=1)
    """Scratch memory that kernels may use, which each lane holds; TensorRT's default is all that the device has."""
    tf32: bool = _option(True)
    """Whether fp32 matrix products may round their inputs to 10 bits of mantissa, TensorRT's default."""
    version_compatible: bool = _option(False)
    """The engine also runs under other versions of TensorRT, lean and dispatch included, somewhat slower. It brings code along."""
    hardware_compatibility: str = _option("none", choices=("none", "ampere_plus"))
    refit: bool = _option(False)
    """Keep weights apart: a version with the same graph gets its weights into the cached engine, and needs no build. Somewhat slower."""


@dataclass(frozen=True, slots=True)
class Options:
    trust_plans: bool = _option(False)
    """Load plans of versions whose signature was not verified."""
    cuda_graphs: bool = _option(True)
    cache_directory: str = _option("")
    """Where built engines are kept; empty: headrace/engines below the user's cache."""
    cache_mb: int = _option(20 << 10, least=1)
    """The longest unused engines beyond it are deleted."""
    build_timeout_s: int = _option(3600, least=1)
    build: BuildOptions = BuildOptions()
    profiles: Mapping[str, str] = field(default_factory=dict)


def parse_options(given: Mapping[str, str]) -> Options:
    """Raises LoadError for an unknown name or value."""
    profiles = {name: value for name, value in given.items() if name.startswith(PROFILE_PREFIX)}
    values: dict[type, dict[str, Any]] = {Options: {}, BuildOptions: {}}
    for name, text in given.items():
        if name in profiles:
            continue
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, [*_KNOWN, PROFILE_PREFIX], 1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_KNOWN)}, {PROFILE_PREFIX}INPUT"
            raise LoadError(f"unknown tensorrt option '{name}', {hint}")
        owner, metadata, default = _KNOWN[name]
        values[owner][name] = _decode(name, text, default, **metadata)
    return Options(**values[Options], build=BuildOptions(**values[BuildOptions]), profiles=profiles)


def _decode(name: str, text: str, default: object, *, choices: tuple[str, ...], least: int, most: int | None) -> object:
    if isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
        expected = "true or false"
    elif choices:
        if text in choices:
            return text
        expected = f"one of {', '.join(choices)}"
    elif isinstance(default, str):
        return text
    else:
        if text.isascii() and text.isdigit() and least <= int(text) <= (most if most is not None else int(text)):
            return int(text)
        expected = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
    raise LoadError(f"tensorrt option '{name}': expected {expected}, got '{text}'")


_KNOWN = {
    each.name: (owner, dict(each.metadata), each.default)
    for owner in (Options, BuildOptions)
    for each in fields(owner)
    if "choices" in each.metadata
}
