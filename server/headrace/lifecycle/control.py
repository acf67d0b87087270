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
from headrace.lifecycle.manager import ModelManager
from headrace.lifecycle.policy import select_versions
from headrace.lifecycle.wanted import Offer, WantedVersion, make_offer
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
            if not files:
                await self._load_whole(model, await self._offer_source(model, config))
                return
            if config is None:
                raise ServerError(f"failed to load '{model}', failed to poll from model repository")
            known = (await self._list()).get(model)
            if known is not None and model not in known[1].models:
                raise ServerError(f"failed to load '{model}', failed to poll from model repository: {known[1].errors[model]}")
            if known is not None:
                config = _keep_signatures(config, known[1].models[model].config)
            sent = await asyncio.to_thread(_SentFiles, model, files)
            try:
                await self._load_whole(model, _offer_files(model, config, sent))
            finally:
                sent.close()

    async def _load_whole(self, model: str, offer: Offer) -> None:
        if not select_versions(offer.versions, offer.config.version_policy):
            raise ServerError(f"failed to load '{model}', no version is available")
        await self._models.add(model).load_whole(offer)

    async def unload(self, model: str, *, with_dependents: bool) -> None:
        async with self._lock(model):
            entry = self._models.models.get(model)
            if entry is not None:
                self._models.withdraw(model)
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


def _keep_signatures(config: ModelConfig, own: ModelConfig) -> ModelConfig:
    """How versions have to be signed is nothing that a request can change."""
    return dataclasses.replace(config, signature_policy=own.signature_policy, signature_key=own.signature_key)


def _with_config(offer: Offer, config: ModelConfig) -> Offer:
    config = _keep_signatures(config, offer.config)
    versions = {
        number: dataclasses.replace(want, config=config, token=want.token + config.serving_digest())
        for number, want in offer.versions.items()
    }
    return dataclasses.replace(offer, config=config, versions=versions)


def _offer_files(model: str, config: ModelConfig, sent: _SentFiles) -> Offer:
    token = sent.digest + config.serving_digest()
    versions = {
        number: WantedVersion(model, number, token, config, functools.partial(sent.fetch, number), REQUEST, REQUEST)
        for number in sent.versions
    }
    return Offer(REQUEST, config, versions, {})


class _SentFiles:
    """Owns a temporary directory with a model's files, deleted when no version is in it and none will come. Made in a thread."""

    def __init__(self, model: str, files: Mapping[str, bytes]) -> None:
        digest = hashlib.sha256(b"".join(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode() for path in sorted(files)))
        self.digest = digest.hexdigest()[:16]
        self.versions = sorted({int(path.partition("/")[0]) for path in files if is_version_name(path.partition("/")[0])})
        self._root = _write_files(model, files)
        self._directory = self._root / model
        self._users = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"_SentFiles({self._directory}, {self._users} users, closed={self._is_closed})"

    async def fetch(self, version: int) -> Fetched:
        self._users += 1
        return Fetched(self._directory, self._directory / str(version), self._release)

    def close(self) -> None:
        """The load is over: of its versions those that are loaded now stay, and no other is taken up."""
        self._is_closed = True
        self._delete_if_unused()

    def _release(self) -> None:
        self._users -= 1
        self._delete_if_unused()

    def _delete_if_unused(self) -> None:
        if self._is_closed and not self._users:
            shutil.rmtree(self._root, ignore_errors=True)


def _write_files(model: str, files: Mapping[str, bytes]) -> Path:
    """A temporary directory with the model's in it. Paths were checked when the request was read."""
    root = Path(tempfile.mkdtemp(prefix="headrace-"))
    try:
        for path, content in files.items():
            target = root / model / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return root
