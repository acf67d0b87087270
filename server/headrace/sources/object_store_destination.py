"""Publishing into an object store. The layout: object_store_index.py.

1. `.claim-<version>`, created if it is not there: nobody else uploads under this number now. 2. The files. 3. The manifest, created
if it is not there. 4. The index, read, changed and written if it is still what was read, again until that holds. Until then a reader
of the index sees nothing of the version, from then on all of it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.config import SourceConfig
from headrace.errors import LoadError
from headrace.sources.base import Destination, is_version_name
from headrace.sources.manifest import MANIFEST_NAME, FileEntry
from headrace.sources.object_store_client import Conflict, Missing, StoreError, open_store, public_uri, readable_errors
from headrace.sources.object_store_index import (
    CLAIM_PREFIX,
    INDEX_NAME,
    StoredFile,
    StoredModel,
    StoredVersion,
    decode_index,
    encode_index,
    group_objects,
)
from headrace.telemetry.log import get_logger

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion

log = get_logger(__name__)

SETTLED_AFTER = 60.0
"""Seconds without a change after which files without a manifest are taken for whole when the first index is made."""


class _Unclear(StoreError):
    """The write of the index got no answer, and the index cannot be read now."""


class ObjectStoreDestination(Destination):
    """Owns what lies beside the versions of the model that is open: its local copies, and what the index is to say of them."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(public_uri(uri).rstrip("/"), config)
        self._store = open_store(uri)
        self._beside: dict[str, StoredFile] = {}

    @contextmanager
    def open_model(self, model: str) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(prefix="headrace-publish-"))
        try:
            directory = place / model
            directory.mkdir()
            self._beside = {}
            for path, _ in self._list(model):
                name = path.removeprefix(f"{model}/")
                if "/" not in name and not name.startswith((".", "_")):
                    raw, mode = self._read(path)
                    (directory / name).write_bytes(raw)
                    self._beside[name] = StoredFile(mode.get("e_tag") or "", len(raw), hashlib.sha256(raw).hexdigest())
            yield directory
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def numbers(self, model: str) -> list[int]:
        """Those that somebody is publishing or copying now, too."""
        names = {path.split("/")[1].removeprefix(CLAIM_PREFIX) for path, _ in self._list(model)}
        return sorted(int(name) for name in names if is_version_name(name))

    def commit(self, model: str, version: int, staging: Path) -> str | None:
        folder, claim = f"{model}/{version}", f"{model}/{CLAIM_PREFIX}{version}"
        try:
            self._put(claim, datetime.now(UTC).isoformat(timespec="seconds").encode(), "create")
        except Conflict:
            return None
        uploaded: list[str] = []
        try:
            if self._list(folder):
                return None
            manifest = staging / MANIFEST_NAME
            for path in [*sorted(path for path in staging.rglob("*") if path.is_file() and path != manifest), manifest]:
                uploaded.append(f"{folder}/{path.relative_to(staging).as_posix()}")
                self._put(uploaded[-1], path, "create" if path == manifest else "overwrite")
            raw = manifest.read_bytes()
            self._enter(model, version, FileEntry(hashlib.sha256(raw).hexdigest(), len(raw)))
        except _Unclear:
            raise
        except Conflict:  # a manifest by somebody who makes no claims; it is theirs
            self._take_back(uploaded[:-1])
            return None
        except BaseException:
            self._take_back(uploaded)
            raise
        finally:
            self._take_back([claim])
        return f"{self.uri}/{folder}"

    # -- the index -----------------------------------------------------------------------------------------------------

    def _enter(self, model: str, version: int, manifest: FileEntry) -> None:
        """Returns once the index names the version. Raises _Unclear where it may or may not, anything else where it does not."""
        while True:
            models, mode = self._read_index()
            before = models.get(model, StoredModel({}))
            after = StoredModel({**before.versions, version: StoredVersion(manifest)}, self._beside)
            try:
                self._put(INDEX_NAME, encode_index({**models, model: after}), mode)
                return
            except Conflict:
                continue  # somebody else has published: theirs stays, ours is added
            except BaseException as error:
                try:
                    is_entered = self._is_entered(model, version, manifest)
                except OSError:
                    raise _Unclear(f"{error}; whether {model}/{version} was published is not known: its files stay") from None
                if not is_entered:
                    raise
                return

    def _is_entered(self, model: str, version: int, manifest: FileEntry) -> bool:
        """After a write of which no answer came: it may have arrived all the same."""
        models, _ = self._read_index()
        found = models.get(model, StoredModel({})).versions.get(version)
        return found is not None and found.manifest == manifest

    def _read_index(self) -> tuple[Mapping[str, StoredModel], PutMode]:
        """And how to write it, so that it only replaces what was read."""
        try:
            raw, mode = self._read(INDEX_NAME)
        except Missing:
            return self._adopt(), "create"
        if not mode:
            raise StoreError(f"{self.uri}/{INDEX_NAME}: expected an etag from the store: without one publishers would undo each other")
        try:
            return decode_index(raw), mode
        except LoadError as error:
            raise StoreError(f"{self.uri}/{error}") from None

    def _adopt(self) -> Mapping[str, StoredModel]:
        """What others have put there: with the first index it would vanish."""
        models = {}
        for name, model in group_objects(self._list("")).items():
            versions = {number: self._adopt_version(name, number, version) for number, version in model.versions.items()}
            models[name] = StoredModel(versions, model.files)
        return models

    def _adopt_version(self, model: str, number: int, version: StoredVersion) -> StoredVersion:
        if MANIFEST_NAME in version.files:
            raw, _ = self._read(f"{model}/{number}/{MANIFEST_NAME}")
            return StoredVersion(FileEntry(hashlib.sha256(raw).hexdigest(), len(raw)))
        age = time.time() - version.changed_at
        if age < SETTLED_AFTER:
            raise StoreError(
                f"{self.uri}/{model}/{number}: no {MANIFEST_NAME}, and changed {max(age, 0):.0f} s ago: somebody may still be copying "
                f"it; publish again when it has been unchanged for {SETTLED_AFTER:.0f} s"
            )
        return version

    # -- the store -----------------------------------------------------------------------------------------------------

    def _list(self, prefix: str) -> list[tuple[str, StoredFile]]:
        import obstore

        with readable_errors(self.uri):
            return [
                (meta["path"], StoredFile(meta["e_tag"] or "", meta["size"], changed_at=meta["last_modified"].timestamp()))
                for chunk in obstore.list(self._store, prefix or None)
                for meta in chunk
            ]

    def _read(self, path: str) -> tuple[bytes, UpdateVersion]:
        """The content, and what names it in a conditional write."""
        import obstore

        with readable_errors(f"{self.uri}/{path}"):
            result = obstore.get(self._store, path)
            names: UpdateVersion = {}
            if etag := result.meta["e_tag"]:
                names["e_tag"] = etag
            if version := result.meta["version"]:
                names["version"] = version
            return bytes(result.bytes()), names

    def _put(self, path: str, content: bytes | Path, mode: PutMode) -> None:
        import obstore

        with readable_errors(f"{self.uri}/{path}"):
            obstore.put(self._store, path, content, mode=mode)

    def _take_back(self, paths: list[str]) -> None:
        """As far as it goes: what stays without an index entry is nobody's version."""
        import obstore

        for path in reversed(paths):  # the manifest first: without it nothing of the rest is taken for whole
            try:
                with readable_errors(path):
                    obstore.delete(self._store, path)
            except Missing:
                pass
            except OSError as error:
                log.warning("object left behind", store=self.uri, reason=str(error))
