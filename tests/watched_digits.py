"""The digits example with windows so small that drift shows within seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "models" / "digits"
SETTINGS = """
[drift]
reference = "learn"
learn_rows = 600
window_rows = 400
budget = 0
"""


def make_repository(directory: Path) -> Path:
    shutil.copytree(EXAMPLE, directory / "digits")
    settings = directory / "digits" / "model.toml"
    settings.write_text(settings.read_text() + SETTINGS)
    return directory
