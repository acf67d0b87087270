"""What of a version is watched for drift, and against what."""

from __future__ import annotations

from headrace.drift.plan import choose
from headrace.drift.reference import Reference
from headrace.drift.watch import DriftWatch, Subject
from headrace.lifecycle.effective import EffectiveModel
from headrace.telemetry.counters import VersionCounters
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


def drift_subject(
    version: int, effective: EffectiveModel, published: Reference | None, predecessor: DriftWatch | None, counters: VersionCounters
) -> Subject | None:
    """Against what was published with the version, or else what its predecessor saw, or what it will see itself. None where nothing is
    to be watched. Raises ConfigError where model.toml wants of a tensor what it cannot be."""
    config = effective.config.drift
    if config.reference == "off":
        return None
    plan = choose(effective.signature, effective.config, effective.labels)
    reference = published
    if reference is None and config.reference == "auto" and predecessor is not None:
        reference = predecessor.live_reference(plan)
    if not plan.tensors and reference is None:
        return None
    log.info(
        "drift watched",
        model=effective.config.name,
        version=version,
        reference=reference.source if reference is not None else f"the first {config.learn_rows} rows",
        left_out=list(reference.left_out if reference is not None else plan.left_out),
    )
    return Subject(effective.config.name, version, config, effective.signature, plan, reference, counters)
