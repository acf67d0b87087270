"""How a request finds its version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headrace.errors import InvalidRequest
from headrace.lifecycle.version import ModelVersion
from headrace.lifecycle.view import Submits
from headrace.requests import InferRequest


@dataclass(frozen=True, slots=True)
class Route:
    """How requests for one model find a version. Immutable: a flip replaces the whole route by one assignment.

    `divert` is there while a trial runs: for a request that names no version, another version than the default one, or None.
    """

    default: ModelVersion | None = None
    live: Mapping[int, ModelVersion] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    divert: Callable[[InferRequest], Submits | None] | None = None

    def find(self, version: str) -> ModelVersion | None:
        """The live version of a number or label, or the default one. Raises InvalidRequest for what is neither."""
        return self.live.get(parse_version(version, self.labels)) if version else self.default

    def choose_for_all(self, version: str) -> ModelVersion | None:
        """The version that is to answer every request for `version`; None when it is another for each, or none."""
        if version:
            return self.find(version) if version.isdigit() else None
        return self.default if self.divert is None else None

    def choose(self, request: InferRequest) -> Submits | None:
        """The version that is to answer this request."""
        if self.divert is not None and not request.version:
            diverted = self.divert(request)
            if diverted is not None:
                return diverted
        return self.find(request.version)


def parse_version(version: str, labels: Mapping[str, int]) -> int:
    """A decimal number >= 0, of at most the 19 digits that the protocol's int64 can have, or a label. Raises InvalidRequest."""
    if version.isascii() and version.isdigit() and len(version) <= 19:
        return int(version)
    if version in labels:
        return labels[version]
    known = f" or a label ({', '.join(sorted(labels))})" if labels else ""
    raise InvalidRequest(f"model version: expected a number such as '1'{known} or nothing, got {version[:40]!r}")
