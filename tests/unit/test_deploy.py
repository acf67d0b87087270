"""What deploy/ holds, without a Prometheus: rules by promtool's own tests, and that windows are the same rules."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from prometheus_expressions import dashboard, rule_files, rules
from prometheus_server import RULES, needs_promtool


@needs_promtool
@pytest.mark.parametrize("name", ["scrape.yml"])
def test_the_configuration_and_its_rules_are_valid(name: str) -> None:
    done = subprocess.run(["promtool", "check", "config", RULES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", sorted([path.name for path in (RULES / "tests").glob("*.yml")]))
def test_rules_do_what_promtool_is_told_to_expect(name: str) -> None:
    done = subprocess.run(["promtool", "test", "rules", name], cwd=RULES / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_windows_of_drift_differ_in_their_length_only() -> None:
    groups = {group["name"]: group for group in yaml.safe_load((RULES / "headrace-drift-rules.yml").read_text())["groups"]}
    short, long = groups["headrace-drift-10m"]["rules"], groups["headrace-drift-1h"]["rules"]
    assert [{key: re.sub(r"10m\b", "1h", text) for key, text in rule.items()} for rule in short] == long


def test_every_alert_has_a_severity_texts_and_a_section_that_says_what_to_do() -> None:
    sections = set(re.findall(r"^#+ (Headrace\w+)$", (RULES / "README.md").read_text(), re.MULTILINE))
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == sections
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert {"summary", "description", "runbook_url"} <= rule["annotations"].keys(), rule["alert"]
        assert rule["annotations"]["runbook_url"].endswith(f"README.md#{rule['alert'].lower()}")


def test_the_example_loads_every_file_of_rules() -> None:
    assert sorted(yaml.safe_load((RULES / "scrape.yml").read_text())["rule_files"]) == rule_files()


def test_panels_of_the_dashboard_lie_beside_each_other() -> None:
    board = dashboard()
    places = set()
    for panel in board["panels"]:
        where = panel["gridPos"]
        cells = {(x, y) for x in range(where["x"], where["x"] + where["w"]) for y in range(where["y"], where["y"] + where["h"])}
        assert where["x"] + where["w"] <= 24, panel["title"]
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {"datasource", "model", "version"} <= {each["name"] for each in board["templating"]["list"]}
