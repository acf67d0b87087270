"""Models loaded and unloaded by request: RepositoryModelLoad and Unload, with Triton's rules."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.config import ModelConfig
from headrace.errors import ConfigError, ServerError
from headrace.lifecycle.manager import ModelManager, make_offer
from headrace.lifecycle.model import Offer
from headrace.lifecycle.version import WantedVersion
from headrace.sources.base import Fetched, Listing, Source, is_version_name
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

REQUEST = "request"
"""Where a version comes from whose files were in the request."""


class ExplicitControl:
    """Owns the order of loads and unloads: those of one model happen one after the other. Event loop only."""

    allows_control = True

    def __init__(self, models: ModelManager, sources: Sequence[Source]) -> None:
        self._models = models
        self._sources = sources
        self._locks: dict[str, asyncio.Lock] = {}

    def __repr__(self) -> str:
        return f"ExplicitControl({[source.uri for source in self._sources]})"

    async def start(self, names: Sequence[str]) -> None:
        """Make what is there known, and load `names` ('*': everything). What fails is shown and does not stop the others."""
        found = await self._list()
        wanted = sorted(found) if "*" in names else names
        for name in found:
            self._models.add(name)
        results = await asyncio.gather(*(self.load(name, None, {}) for name in wanted), return_exceptions=True)
        for name, result in zip(wanted, results, strict=True):
            if isinstance(result, BaseException):
                entry = self._models.add(name)
                entry.error = entry.error or str(result)
                log.error("model not loadable", model=name, reason=str(result))

    async def load(self, model: str, config: ModelConfig | None, files: Mapping[str, bytes]) -> None:
        async with self._lock(model):
            offer = await self._offer_files(model, config, files) if files else await self._offer_source(model, config)
            await self._models.add(model).load_whole(offer)

    async def unload(self, model: str, *, with_dependents: bool) -> None:
        async with self._lock(model):
            entry = self._models.models.get(model)
            if entry is not None:
                entry.withdraw()
                await entry.settle()

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())

    async def _list(self) -> dict[str, tuple[Source, Listing]]:
        """Who has which model. Raises ServerError when a source cannot be asked, or two have the same one."""
        found: dict[str, tuple[Source, Listing]] = {}
        for source in self._sources:
            try:
                listing = await source.list()
            except (OSError, ConfigError) as error:
                raise ServerError(f"failed to poll from model repository: {source.uri}: {error}") from None
            for name in [*listing.models, *listing.errors]:
                if name in found:
                    raise ServerError(f"model '{name}' is in two repositories: {found[name][0].uri} and {source.uri}; expected one")
                found[name] = (source, listing)
        return found

    async def _offer_source(self, model: str, config: ModelConfig | None) -> Offer:
        found = (await self._list()).get(model)
        problem = f"failed to load '{model}', failed to poll from model repository"
        if found is None:
            raise ServerError(problem)
        source, listing = found
        if model not in listing.models:
            raise ServerError(f"{problem}: {listing.errors[model]}")
        offer = make_offer(source, listing.models[model])
        return offer if config is None else _with_config(offer, config)

    async def _offer_files(self, model: str, config: ModelConfig | None, files: Mapping[str, bytes]) -> Offer:
        if config is None:
            raise ServerError(f"failed to load '{model}', failed to poll from model repository")
        directory = await asyncio.to_thread(_write_files, model, files)
        numbers = sorted({int(path.partition("/")[0]) for path in files if is_version_name(path.partition("/")[0])})
        digest = hashlib.sha256(b"".join(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode() for path in sorted(files)))
        token = digest.hexdigest()[:16] + config.serving_digest()
        left = _Countdown(len(numbers), directory.parent)
        return Offer(
            "request",
            config,
            {
                n: WantedVersion(model, n, token, config, functools.partial(_fetch, directory, n, left), "request", "request")
                for n in numbers
            },
            {},
        )


def _with_config(offer: Offer, config: ModelConfig) -> Offer:
    versions = {
        number: dataclasses.replace(want, config=config, token=want.token + config.serving_digest())
        for number, want in offer.versions.items()
    }
    return dataclasses.replace(offer, config=config, versions=versions)


class _Countdown:
    """Deletes a directory once every version in it was released."""

    def __init__(self, count: int, directory: Path) -> None:
        self._count = count
        self._directory = directory

    def release(self) -> None:
        self._count -= 1
        if self._count <= 0:
            shutil.rmtree(self._directory, ignore_errors=True)


async def _fetch(directory: Path, version: int, left: _Countdown) -> Fetched:
    return Fetched(directory, directory / str(version), left.release)


def _write_files(model: str, files: Mapping[str, bytes]) -> Path:
    """The model's directory, in a temporary one of its own. Paths were checked when the request was read."""
    root = Path(tempfile.mkdtemp(prefix="headrace-"))
    directory = root / model
    for path, content in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return directory
