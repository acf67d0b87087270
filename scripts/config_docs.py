"""Write docs/configuration.md from the declarations in config.py: `python scripts/config_docs.py [--check]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

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
from headrace.config_loading import option_keys

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

Generated from `server/headrace/config.py`; change it there and run `python scripts/config_docs.py`.

Nothing here is needed to serve a model. An unknown key is an error that names the nearest known one.

## The server: headrace.toml < environment < flags

`headrace serve --config headrace.toml`, or `HEADRACE_CONFIG`. Each key is also a flag (`--log-level`) and an environment
variable (`HEADRACE_LOG_LEVEL`); lists are separated by commas there.
"""

MODEL = """
## A model: model.toml

`<repository>/<model>/model.toml`, beside the version directories. A Triton `config.pbtxt` in its place is honoured instead;
both at once is an error. What a model is served with, and where each value came from: `headrace check <repository>`.
"""

LABELS = """
### [labels]

Version by label, such as `stable = 3`. Requests may name a label as their version. A label moves only to a version that is live.
"""


def render() -> str:
    parts = [HEAD, table(ServerConfig), MODEL, table(ModelConfig), table(BatchingConfig)]
    parts += ["\n### [instances]\n", table(InstanceConfig), "\n### [[input]] and [[output]]\n", table(TensorConfig)]
    parts += ["\n### [[preprocess]]\n", table(PreprocessConfig), "\n### [[postprocess]]\n", table(PostprocessConfig)]
    parts += ["\n### [rollout]\n", table(RolloutConfig), LABELS, "\n### [drift]\n", table(DriftConfig)]
    parts += ["\n### [capture]\n", table(CaptureConfig), "\n### [feedback]\n", table(FeedbackConfig)]
    return "\n".join(parts)


def table(section: type[Any]) -> str:
    rows = ["| key | default | what it does |", "|---|---|---|"]
    for key, field in option_keys(section).items():
        doc = field.metadata["doc"] + (f" One of: {', '.join(field.metadata['choices'])}." if field.metadata.get("choices") else "")
        rows.append(f"| `{key}` | {default(field)} | {doc.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING or value in (None, "", ()):
        return ""
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`"


def main() -> int:
    text = render()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print("docs/configuration.md is stale: run `python scripts/config_docs.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
