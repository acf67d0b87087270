"""Every expression that deploy/ has, and what it says of metrics: their names and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from prometheus_server import DEPLOY, RULES

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_DURATION = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_FOREIGN = frozenset({"up", "ALERTS"})
"""What Prometheus itself makes."""
VARIABLES = {"$__rate_interval": "5m", "$model": ".*", "$version": ".*", "$feature": ".*", "$job": ".*"}


def rule_files() -> list[str]:
    return sorted([path.name for path in RULES.glob("headrace-*.yml")])


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((RULES / name).read_text()) for name in rule_files()]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "headrace.json").read_text())
    return found


def dashboard_expressions() -> list[tuple[str, str]]:
    """(panel, expression), as Grafana asks them: with values for its variables."""
    board = dashboard()
    found = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    found += [(each["name"], each["expr"]) for each in board["annotations"]["list"]]
    return [(title, substitute(expression)) for title, expression in found]


def substitute(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def selectors(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """(metric, labels that are asked of it), of our metrics."""
    plain = _GROUPING.sub("", _DURATION.sub("", _STRING.sub('""', expression)))
    for name, matchers in _SELECTOR.findall(plain):
        if re.match(r"(headrace|nv|process|python)[_:]", name) and name not in _FOREIGN:
            yield name, frozenset(_MATCHER.findall(matchers))


def grouping_labels(expression: str) -> frozenset[str]:
    lists = _GROUPING.findall(_STRING.sub('""', expression))
    return frozenset([label.strip() for each in lists for label in each.split(",") if label.strip()])
