"""What is to be served: versions, and how to get them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from headrace.config import ModelConfig
from headrace.lifecycle.policy import Key
from headrace.sources.base import Fetched, ModelRef, Source


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """A version that is to be served: what it is, and how to get it. `token` tells two contents of one number apart."""

    model: str
    version: int
    token: str
    config: ModelConfig
    fetch: Callable[[], Awaitable[Fetched]]
    location: str = ""
    source: str = ""

    @property
    def key(self) -> Key:
        return Key(self.version, self.token)


@dataclass(frozen=True, slots=True)
class Offer:
    """What is to be had of a model now, and how it is to be served."""

    source: str
    config: ModelConfig
    versions: Mapping[int, WantedVersion]
    labels: Mapping[str, int]


def make_offer(source: Source, ref: ModelRef) -> Offer:
    versions = {
        number: WantedVersion(
            ref.name, number, version.token, ref.config, functools.partial(source.fetch, ref, number), version.location, source.uri
        )
        for number, version in ref.versions.items()
    }
    return Offer(source.uri, ref.config, versions, ref.labels)
