"""Rules in a real Prometheus that scrapes two real servers: they must find what the servers find themselves."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as client
from headrace.app import Server
from headrace.config import DriftConfig
from headrace.drift.counting import Counts
from headrace.drift.judgement import judge
from headrace.drift.reference import Reference
from headrace.drift.verdict import DriftReport, WindowVerdict
from headrace.testing import serve_in_process
from prometheus_expressions import dashboard, dashboard_expressions, grouping_labels, rule_files, rules, selectors, substitute
from prometheus_server import RULES, Prometheus, needs_prometheus, prometheus
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "digits"
CLEAN = load_digits().data.astype(np.float32)
MIRRORED = np.ascontiguousarray(CLEAN[:, ::-1])
ROWS = 400
SETTINGS = f"""
[[input]]
name = "image"
maximum = 16.0

[drift]
window_rows = {ROWS}
budget = 0
"""
"""Every row is counted, and a window ends with the last of what a test sends."""
WINDOWS = ("10m", "1h")
PREFIXES = ("headrace", "replica")
"""Of what the rules record: as they are shipped, and as `for_each_replica` changes them."""


def send(address: str, images: np.ndarray, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    with client.InferenceServerClient(address) as stub:
        for _ in range(rows // 8):
            batch = images[random.integers(0, len(images), 8)]
            tensor = client.InferInput("image", list(batch.shape), "FP32")
            tensor.set_data_from_numpy(batch)
            stub.infer("digits", [tensor])


def report_of(server: Server) -> DriftReport:
    report = server.models.resolve("digits", "").drift
    assert report is not None
    return report


async def until(is_so: Callable[[], bool]) -> None:
    """What is counted after an answer, scraped after that and evaluated after that has arrived."""
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(is_so):
            await asyncio.sleep(0.2)


def make_repository(directory: Path) -> Path:
    """Digits with the reference that is published with them: all replicas compare with the same one."""
    shutil.copytree(EXAMPLE, directory / "digits")
    settings = directory / "digits" / "model.toml"
    settings.write_text(settings.read_text() + SETTINGS)
    return directory


def drift_rules() -> str:
    """As they are shipped, but for how often they are evaluated."""
    return (RULES / "headrace-drift-rules.yml").read_text().replace("interval: 1m", "interval: 2s")


def for_each_replica(rules: str) -> str:
    """The same rules, of one replica at a time."""
    return (
        rules.replace("(model, version", "(instance, model, version").replace("headrace:", "replica:").replace("name: ", "name: replica-")
    )


async def settle(found: Prometheus, prefix: str, window: str, rows: int) -> None:
    """All rows are in, and the last rule of their group was evaluated after that: those between were then as well."""
    first, last = f"{prefix}:drift_window_rows:increase{window}", f"{prefix}:data_quality:ratio{window}"
    await until(lambda: found.total(first) == rows)
    counted_at = max((await asyncio.to_thread(found.query, f"timestamp({first})")).values())
    await until(lambda: min(found.query(f"timestamp({last})").values(), default=0) >= counted_at)


def compare(found: Prometheus, prefix: str, window: str, reference: Reference, verdict: WindowVerdict, **only: str) -> None:
    """All that rules compute of one window against the server's own code, to the precision of floating point."""
    chosen = ",".join(f'{key}="{value}"' for key, value in only.items())
    for statistic in ("psi", "js", "ks"):
        scores = found.query(f"{prefix}:drift_{statistic}:score{window}{{{chosen}}}")
        criticals = found.query(f"{prefix}:drift_{statistic}:critical{window}{{{chosen}}}")
        expected = {
            (each.feature.side.value, each.feature.tensor, each.feature.name): score
            for each, score in zip(reference.features, verdict.scores, strict=True)
            if statistic != "ks" or each.is_numeric
        }
        for values, field in ((scores, statistic), (criticals, f"{statistic}_critical")):
            by_feature = {(d["side"], d["tensor"], d["feature"]): value for d, value in ((dict(k), v) for k, v in values.items())}
            assert by_feature == {key: pytest.approx(getattr(score, field), rel=1e-9, abs=1e-9) for key, score in expected.items()}
    accuracy = found.query(f"{prefix}:estimated_accuracy:ratio{window}{{{chosen}}}")
    assert list(accuracy.values()) == [pytest.approx(verdict.estimated_accuracy)]
    error = found.query(f"{prefix}:estimated_accuracy:error{window}{{{chosen}}}")
    assert list(error.values()) == [pytest.approx(verdict.estimated_error)]


def check_statistics(found: Prometheus, reference: Reference, servers: Sequence[Server]) -> None:
    together = Counts.zero(reference)
    for server in servers:
        report = report_of(server)
        assert report.totals is not None
        assert report.tumbling is not None
        together.add(report.totals)
        for window in WINDOWS:
            compare(found, "replica", window, reference, report.tumbling, instance=server.http_address)
        scores = found.query(f'headrace_drift_score{{window="tumbling",stat="psi",instance="{server.http_address}"}}')
        assert sorted(scores.values()) == pytest.approx(sorted([score.psi for score in report.tumbling.scores]))
    verdict = judge(reference, together, DriftConfig(window_rows=ROWS), "tumbling", 0.0, 1.0)
    assert verdict.rows == len(servers) * ROWS
    for window in WINDOWS:
        compare(found, "headrace", window, reference, verdict)
    # Mirrored digits are found although half of the rows are clean.
    drifting = found.query("headrace:drift_psi:score1h > headrace:drift_psi:critical1h")
    assert {"confidence", "0"} <= {dict(labels)["feature"] for labels in drifting}


@pytest.mark.slow
@needs_prometheus
async def test_rules_over_two_replicas_equal_the_servers_own_statistics(tmp_path: Path) -> None:
    models = make_repository(tmp_path / "models")
    async with (
        serve_in_process(models) as first,
        serve_in_process(models) as second,
        prometheus(tmp_path, [each.http_address for each in (first, second)], [drift_rules(), for_each_replica(drift_rules())]) as found,
    ):
        reference = report_of(first).reference
        assert reference is not None
        # Both were scraped before the first row: what is counted from here on is all that lies in the rules' windows.
        await until(lambda: len(found.query("count by (instance) (headrace_drift_rows_total)")) == 2)
        assert await asyncio.to_thread(found.total, "headrace_drift_seen_rows_total") == 0

        await asyncio.to_thread(send, first.grpc_addresses[0], CLEAN, ROWS, seed=1)
        await asyncio.to_thread(send, second.grpc_addresses[0], MIRRORED, ROWS, seed=2)
        await until(lambda: all(report_of(each).tumbling is not None for each in (first, second)))
        everything = 2 * ROWS * len(reference.features)
        await until(lambda: found.total("headrace_drift_window_samples") == 2 * ROWS)
        for prefix, window in product(PREFIXES, WINDOWS):
            await settle(found, prefix, window, everything)

        await asyncio.to_thread(check_statistics, found, reference, (first, second))


@pytest.mark.slow
@needs_prometheus
async def test_every_expression_finds_metrics_and_labels_that_a_server_has(tmp_path: Path) -> None:
    """By name in what is exported; then by a real Prometheus, which refuses what it cannot parse."""
    models = make_repository(tmp_path / "models")
    shutil.copytree(EXAMPLE.parent / "diabetes", models / "diabetes")  # which learns its reference
    files = [drift_rules(), *[(RULES / name).read_text() for name in rule_files() if "drift" not in name]]
    async with (
        serve_in_process(models, drift_webhooks=("http://127.0.0.1:9/nobody",)) as server,
        prometheus(tmp_path, [server.http_address], [text.replace("interval: 30s", "interval: 2s") for text in files]) as found,
    ):
        await until(lambda: len(found.query("headrace_drift_seen_rows_total")) == 2)
        await asyncio.to_thread(send, server.grpc_addresses[0], MIRRORED * 2, 2 * ROWS, seed=1)
        await until(lambda: report_of(server).sliding is not None)
        await until(lambda: len(found.query("headrace_drift_score")) > 0)
        recorded = {rule["record"] for rule in rules() if "record" in rule}
        await asyncio.to_thread(check_names, found, recorded)
        await until(lambda: all(found.query(name) for name in recorded))
        await asyncio.to_thread(check_answers, found)


def check_names(found: Prometheus, recorded: set[str]) -> None:
    """Of metrics and labels, in all that rules and panels say, against what was scraped."""
    exported = exported_labels(found)
    used = [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()] + dashboard_expressions()
    assert len(used) > 100
    known = frozenset[str]().union(*exported.values())
    for where, expression in used:
        for name, labels in selectors(expression):
            if name not in recorded:
                assert name in exported, f"{where}: no such metric: {name}"
                assert labels <= exported[name], f"{where}: {name} has {sorted(exported[name])}"
        assert grouping_labels(expression) <= known, where
    assert {name for _, expression in used for name, _ in selectors(expression) if ":" in name} <= recorded
    # There before the first failure, which a rate would miss else.
    events = found.query('sum by (event) (headrace_model_events_total{event=~"failed|rolled_back"})')
    assert list(events.values()) == [0, 0]


def check_answers(found: Prometheus) -> None:
    """Every panel and variable has something to show, and no rule has failed."""
    for title, expression in dashboard_expressions():
        assert found.query(expression) or title in QUIET_PANELS, f"panel '{title}' is empty: {expression}"
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            series, label = LABEL_VALUES.fullmatch(variable["definition"]).groups()  # type: ignore[union-attr]
            assert found.get(f"label/{label}/values", **{"match[]": substitute(series)}), variable["name"]
    broken = [rule for group in found.get("rules")["groups"] for rule in group["rules"] if rule["health"] != "ok"]
    assert broken == []


QUIET_PANELS = {"Versions that are not live", "Alerts", "New versions"}
"""Nothing to show while all is well."""
LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


def exported_labels(found: Prometheus) -> dict[str, frozenset[str]]:
    """By the name of a metric its labels, of everything that was scraped."""
    labels: dict[str, frozenset[str]] = {}
    for series in found.get("series", **{"match[]": '{job="headrace"}'}):
        labels[series["__name__"]] = labels.get(series["__name__"], frozenset()) | series.keys() - {"__name__"}
    return labels
