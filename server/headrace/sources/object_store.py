"""Models in an object store: s3://, gs://, az://, abfs(s)://, or behind plain http(s)://. The layout: object_store_index.py.

Where there is an index, it is the whole truth: what it does not name is not there, and a poll that finds it unchanged costs one
conditional request. Without one everything below the prefix is listed, which HTTP cannot do.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headrace.config import ModelConfig, SourceConfig
from headrace.errors import HeadraceError, LoadError
from headrace.lifecycle.policy import select_versions
from headrace.model_files import CONFIG_FILES, parse_model_config
from headrace.sources.base import Fetched, Listing, ModelRef, Source, VersionRef
from headrace.sources.cache import VersionCache, WantedFile
from headrace.sources.manifest import LARGEST_MANIFEST, MANIFEST_NAME, SIGNATURE_NAME, FileEntry, decode_manifest
from headrace.sources.object_store_client import Missing, NotModified, StoreError, open_store, public_uri, readable_errors
from headrace.sources.object_store_index import (
    INDEX_NAME,
    Models,
    StoredFile,
    StoredModel,
    StoredVersion,
    decode_index,
    group_objects,
    version_token,
)

if TYPE_CHECKING:
    from obstore import GetOptions

CHUNK_BYTES = 1 << 20
LISTED_AT_ONCE = 1000
READS_AT_ONCE = 8
LARGEST_INDEX = 64 << 20


@dataclass(frozen=True, slots=True)
class _Offer:
    """A listing with what it was made from."""

    listing: Listing
    models: Models


class ObjectStoreSource(Source):
    """Owns the latest offer, the etag of the index that it was made from, small files by name and etag, and its cache."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(uri, config)
        self._place = public_uri(uri).rstrip("/")
        self._store = open_store(uri)
        self._can_list = not uri.startswith(("http://", "https://"))
        self._offer = _Offer(Listing({}), {})
        self._etag = ""
        self._small: dict[tuple[str, str, str], bytes] = {}
        self._cache = VersionCache(config)

    async def list(self) -> Listing:
        try:
            raw, etag = await self._read(INDEX_NAME, LARGEST_INDEX, {"if_none_match": self._etag} if self._etag else None)
        except NotModified:
            return self._offer.listing
        except Missing as error:
            self._etag = ""
            if not self._can_list:
                raise StoreError(f"{error}: over HTTP expected the index that publishing writes") from None
            offer = await self._describe(await self._list_objects())
        else:
            try:
                offer = await self._describe(decode_index(raw))
            except LoadError as error:
                raise StoreError(f"{self._place}/{error}") from None
            # What is wrong beside the index can be mended without it: then it is to be looked at again.
            self._etag = "" if offer.listing.errors else etag
        self._offer = offer
        return offer.listing

    async def fetch(self, model: ModelRef, version: int) -> Fetched:
        stored = self._offer.models.get(model.name)
        if stored is None or version not in stored.versions:
            raise LoadError(f"{model.name}/{version} is not there any more")
        try:
            files = await self._files_of(model.name, version, stored.versions[version])
        except OSError as error:
            raise LoadError(str(error)) from None
        beside = [self._wanted(model.name, name, file) for name, file in stored.files.items()]
        return await self._cache.fetch(model.name, version, files, beside)

    async def close(self) -> None:
        await self._cache.close()

    # -- the offer -----------------------------------------------------------------------------------------------------

    async def _list_objects(self) -> dict[str, StoredModel]:
        """With the manifests read, as they are in an index."""
        import obstore

        objects = []
        with readable_errors(self._place):
            async for chunk in obstore.list(self._store, chunk_size=LISTED_AT_ONCE):
                objects += [
                    (meta["path"], StoredFile(meta["e_tag"] or "", meta["size"], changed_at=meta["last_modified"].timestamp()))
                    for meta in chunk
                ]
        models = group_objects(objects)
        reading = asyncio.Semaphore(READS_AT_ONCE)

        async def read(name: str, number: int, version: StoredVersion) -> tuple[int, StoredVersion]:
            manifest = version.files.get(MANIFEST_NAME)
            if manifest is None:
                return number, version
            async with reading:
                raw = await self._read_small(f"{name}/{number}/{MANIFEST_NAME}", manifest)
            return number, replace(version, manifest=FileEntry(hashlib.sha256(raw).hexdigest(), len(raw)))

        return {
            name: replace(model, versions=dict(await asyncio.gather(*(read(name, *item) for item in model.versions.items()))))
            for name, model in models.items()
        }

    async def _describe(self, models: Models) -> _Offer:
        refs: dict[str, ModelRef] = {}
        errors: dict[str, str] = {}
        kept: dict[tuple[str, str, str], bytes] = {}
        for name, model in models.items():
            try:
                config = await self._read_config(name, model)
                select_versions((), config.version_policy)  # a policy that cannot be read is this model's error
            except (HeadraceError, Missing) as error:
                errors[name] = str(error)
                continue
            digest = config.serving_digest()
            refs[name] = ModelRef(
                name, config, {number: self._version(name, number, version, model, digest) for number, version in model.versions.items()}
            )
        for name, model in models.items():
            used = {f"{name}/{path}" for path in model.files} | {f"{name}/{number}/{MANIFEST_NAME}" for number in model.versions}
            kept |= {key: raw for key, raw in self._small.items() if key[0] in used}
        self._small = kept
        return _Offer(Listing(refs, errors), models)

    def _version(self, name: str, number: int, version: StoredVersion, model: StoredModel, digest: str) -> VersionRef:
        token = version_token(version, digest, model.files)
        is_listed = MANIFEST_NAME in version.files or any(file.changed_at for file in version.files.values())
        is_complete = not is_listed or self._has_all(name, number, version)
        return VersionRef(token, f"{self._place}/{name}/{number}", is_complete)

    def _has_all(self, name: str, number: int, version: StoredVersion) -> bool:
        """Of a version that was found by listing: a copy by somebody's tool may bring the manifest before the rest."""
        manifest = version.files.get(MANIFEST_NAME)
        raw = self._small.get((f"{name}/{number}/{MANIFEST_NAME}", manifest.etag, "")) if manifest else None
        if raw is None:
            return False
        try:
            files = decode_manifest(raw, MANIFEST_NAME).files
        except LoadError:
            return True  # waiting does not mend it: fetching says what is wrong
        return all(path in version.files and version.files[path].size == entry.size for path, entry in files.items())

    async def _read_config(self, name: str, model: StoredModel) -> ModelConfig:
        raw = {file: await self._read_small(f"{name}/{file}", model.files[file]) for file in CONFIG_FILES if file in model.files}
        return parse_model_config(raw, name)

    # -- files ---------------------------------------------------------------------------------------------------------

    async def _files_of(self, model: str, number: int, version: StoredVersion) -> Sequence[WantedFile]:
        folder = f"{model}/{number}"
        if version.manifest is None:
            return [self._wanted(folder, path, file) for path, file in version.files.items()]
        raw, _ = await self._read(f"{folder}/{MANIFEST_NAME}", LARGEST_MANIFEST)
        digest = hashlib.sha256(raw).hexdigest()
        if digest != version.manifest.sha256:
            raise LoadError(f"{folder}/{MANIFEST_NAME}: expected sha256 {version.manifest.sha256}, got {digest}")
        small = {MANIFEST_NAME: raw}
        try:
            small[SIGNATURE_NAME], _ = await self._read(f"{folder}/{SIGNATURE_NAME}", LARGEST_MANIFEST)
        except Missing:
            pass
        entries = decode_manifest(raw, f"{folder}/{MANIFEST_NAME}").files
        files = {path: StoredFile("", entry.size, entry.sha256) for path, entry in entries.items()}
        return [_given(path, content) for path, content in small.items()] + [
            self._wanted(folder, path, file) for path, file in files.items()
        ]

    def _wanted(self, folder: str, path: str, file: StoredFile) -> WantedFile:
        """By digest where it is known, else by etag: then nothing else is taken for it."""
        condition = "" if file.sha256 else file.etag
        key = f"{self._place}/{folder}/{path} {file.etag}" if condition else ""
        return WantedFile(path, lambda: self._stream(f"{folder}/{path}", path, condition), file.size, file.sha256, key)

    async def _stream(self, path: str, subject: str, etag: str) -> AsyncGenerator[bytes, None]:
        import obstore

        with readable_errors(subject):
            result = await obstore.get_async(self._store, path, options={"if_match": etag} if etag else None)
            async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                yield chunk

    async def _read_small(self, path: str, file: StoredFile) -> bytes:
        """Raises LoadError for another content than the listing or the index says."""
        key = (path, file.etag, file.sha256)
        if key not in self._small:
            raw, etag = await self._read(path, LARGEST_MANIFEST)
            if (hashlib.sha256(raw).hexdigest() != file.sha256) if file.sha256 else (etag != file.etag):
                raise LoadError(f"{path}: not what {INDEX_NAME} says; publishing a version takes the new one up")
            self._small[key] = raw
        return self._small[key]

    async def _read(self, path: str, largest: int, options: GetOptions | None = None) -> tuple[bytes, str]:
        """The content and its etag; empty where the store gives none."""
        import obstore

        with readable_errors(f"{self._place}/{path}"):
            result = await obstore.get_async(self._store, path, options=options)
            if result.meta["size"] > largest:
                raise LoadError(f"{path}: expected at most {largest} bytes, got {result.meta['size']}")
            return bytes(await result.bytes_async()), result.meta["e_tag"] or ""


def _given(path: str, content: bytes) -> WantedFile:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    return WantedFile(path, stream, len(content), hashlib.sha256(content).hexdigest())
