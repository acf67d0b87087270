"""Settings put into a model.toml that people write too: their comments and their order stay."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import tomlkit
from tomlkit.items import Table

from headrace.bench.choice import Settings
from headrace.errors import ConfigError

FILENAME = "model.toml"
NEW_MODE = 0o644


def changes(before: Settings, after: Settings) -> dict[str, int | list[int]]:
    """By dotted key, what has to be written for `after` where the file says or means `before`."""
    found: dict[str, int | list[int]] = {}
    if after.max_batch_size != before.max_batch_size:
        found["max_batch_size"] = after.max_batch_size
    if after.allowed != before.allowed:
        found["allowed_batch_sizes"] = list(after.allowed)
    if after.setup != before.setup:
        found["instances.count"] = after.setup.instances
        found["instances.threads"] = after.setup.threads
    return found


def edited(text: str, values: dict[str, int | list[int]]) -> str:
    """The text with these values, everything else as it was. Pure; the text is valid TOML."""
    document = tomlkit.parse(text)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        table = document if not section else document.setdefault(section, tomlkit.table())
        if isinstance(table, Table) and not len(table) and section and section not in text:
            # A header of its own, apart from what stands before it.
            table.trivia.indent = "\n" if text.strip() else ""
        table[name] = value
    return tomlkit.dumps(document)


def read(path: Path) -> str:
    """Empty where there is none. Raises ConfigError for one that cannot be read."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def replace(path: Path, before: str, after: str, check: Callable[[str], None]) -> None:
    """Put `after` where `before` stood, whole or not at all. `check` raises what is wrong with it before anything is touched.

    A link stays one, and the file it points to keeps its mode. Raises ConfigError when the file is no longer `before`.
    """
    target = Path(os.path.realpath(path))
    check(after)
    descriptor, name = tempfile.mkstemp(prefix=f".{FILENAME}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(after.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, target.stat().st_mode & 0o7777 if target.exists() else NEW_MODE)
        if read(target) != before:
            raise ConfigError(f"{path} was changed while the model was measured; it is left as it is now")
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
