"""Models from an MLflow model registry: mlflow:NAME@ALIAS, mlflow:NAME/VERSION, mlflow:NAME.

A registered version never changes in MLflow; what changes is which versions there are and where an alias points. Moving the alias
is the deployment: the next listing offers the other version, in place of the one before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from headrace.config import ModelConfig, SourceConfig
from headrace.config_loading import LABEL
from headrace.errors import ConfigError, LoadError
from headrace.lifecycle.policy import select_versions
from headrace.model_files import CONFIG_FILES, load_model_config
from headrace.sources.base import Fetched, Listing, ModelRef, Source, VersionRef
from headrace.sources.manifest import MANIFEST_NAME, SIGNATURE_NAME, read_manifest
from headrace.sources.mlflow_registry import (
    MLMODEL,
    READY,
    Artifacts,
    Missing,
    Place,
    RegisteredVersion,
    Registry,
    files_named_in,
    is_mlflow_file,
    onnx_file,
    open_registry,
    parse_uri,
)

MODEL_FILE = "model.onnx"


class MlflowSource(Source):
    """Owns the client and, by version, the configuration found among its artifacts, which is read once."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(uri, config)
        self._place = parse_uri("models", uri)
        self._registry: Registry | None = None
        self._configs: dict[str, ModelConfig] = {}

    async def list(self) -> Listing:
        return await asyncio.to_thread(self._list)

    async def fetch(self, model: ModelRef, version: int) -> Fetched:
        is_cancelled = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(None, self._fetch, model, version, is_cancelled)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # A thread cannot be ended; it looks at this between two files, and what it has made then goes.
            is_cancelled.set()
            work.add_done_callback(_release)
            raise

    # -- the offer -----------------------------------------------------------------------------------------------------

    def _open(self) -> Registry:
        if self._registry is None:
            self._registry = open_registry()
        return self._registry

    def _list(self) -> Listing:
        name = self._place.name
        try:
            return Listing({name: self._read_model(self._open())})
        except Missing as error:
            return Listing({}, {name: str(error)})
        except (ConfigError, LoadError) as error:
            if self._registry is None:
                raise  # the library or the address is missing, which is nothing of this model's
            return Listing({}, {name: str(error)})

    def _read_model(self, registry: Registry) -> ModelRef:
        place = self._place
        aliases = registry.aliases(place.name)
        versions = select_ready(place, _read_wanted(registry, place, aliases))
        config = self._read_config(registry, versions[-1])
        if place.version is not None or place.alias is not None:
            config = dataclasses.replace(config, version_policy="all")  # the URI has chosen
        select_versions((), config.version_policy)
        served_with = config.serving_digest()
        refs = {each.number: VersionRef(f"{each.digest}-{served_with}", f"mlflow:{place.name}/{each.number}") for each in versions}
        labels = {alias: version for alias, version in aliases.items() if LABEL.fullmatch(alias)}
        return ModelRef(place.name, config, refs, labels)

    def _read_config(self, registry: Registry, version: RegisteredVersion) -> ModelConfig:
        name = self._place.name
        if version.digest not in self._configs:
            artifacts = registry.artifacts(name, version.number)
            with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
                for filename in sorted(set(artifacts.list()) & set(CONFIG_FILES)):
                    artifacts.download(filename, Path(folder))
                self._configs = {version.digest: load_model_config(Path(folder), name)}
        return self._configs[version.digest]

    # -- the files -----------------------------------------------------------------------------------------------------

    def _fetch(self, model: ModelRef, version: int, is_cancelled: threading.Event) -> Fetched:
        if self.config.cache_directory:
            os.makedirs(self.config.cache_directory, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix="headrace-", dir=self.config.cache_directory or None))
        try:
            artifacts = self._open().artifacts(model.name, version)
            directory = root / model.name
            for _ in lay_out(artifacts, model.config, directory, version):
                if is_cancelled.is_set():
                    raise LoadError(f"{model.name}/{version}: not wanted any more")
            return Fetched(directory, directory / str(version), lambda: shutil.rmtree(root, ignore_errors=True))
        except BaseException as error:
            shutil.rmtree(root, ignore_errors=True)
            if isinstance(error, (Missing, OSError)):
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise LoadError(f"{model.name}/{version}: {reason}") from None
            raise


def _release(work: asyncio.Future[Fetched]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().release()


def _read_wanted(registry: Registry, place: Place, aliases: Mapping[str, int]) -> Sequence[RegisteredVersion]:
    """What the URI names, ready or not. Raises Missing."""
    if place.alias is None and place.version is None:
        return registry.versions(place.name)
    number = place.version if place.alias is None else aliases.get(place.alias)
    if number is None:
        there = ", ".join(sorted(aliases)) or "none"
        raise Missing(f"registered model '{place.name}' has no alias '{place.alias}'; its aliases: {there}")
    return [registry.version(place.name, number)]


def select_ready(place: Place, versions: Sequence[RegisteredVersion]) -> Sequence[RegisteredVersion]:
    """Those that MLflow has finished, ascending. Raises LoadError when there is none, with the status of the last."""
    ready = [version for version in versions if version.status == READY]
    if ready:
        return ready
    if not versions:
        raise LoadError(f"registered model '{place.name}' has no version")
    last = versions[-1]
    message = f": {last.status_message}" if last.status_message else ""
    raise LoadError(f"{place.name}/{last.number} is {last.status} in MLflow, expected {READY}{message}")


def lay_out(artifacts: Artifacts, config: ModelConfig, directory: Path, version: int) -> Iterator[str]:
    """Download what serving needs into `directory`, a model's, and its version; a pause after each file.

    The version's files are (1) those that a manifest names, whatever else was logged beside them; (2) of a model logged by
    mlflow.onnx all but MLflow's own; (3) of anything else all. What the configuration names lies beside the version.
    """
    target = directory / str(version)
    target.mkdir(parents=True)
    there = artifacts.list()
    beside = [path for path in sorted({*CONFIG_FILES, *files_named_in(config)}) if there.get(path) is False]
    for path in beside:
        yield str(artifacts.download(path, directory))
    if MANIFEST_NAME in there:
        signature = [SIGNATURE_NAME] if SIGNATURE_NAME in there else []
        for path in (MANIFEST_NAME, *signature):
            yield str(artifacts.download(path, target))
        files = sorted(read_manifest(target).files)
    else:
        files = [path for path in artifacts.walk() if path not in beside and not path.startswith(".")]
        if MLMODEL in there:
            _check_flavour(artifacts, directory)
            files = [path for path in files if not is_mlflow_file(path)]
    if not files:
        raise LoadError(f"{directory.name}/{version}: expected a model among its artifacts, found none")
    for path in files:
        yield str(artifacts.download(path, target))
    if MANIFEST_NAME not in there and config.filename is None:
        _name_model(target)


def _check_flavour(artifacts: Artifacts, directory: Path) -> None:
    import yaml

    place = directory.name
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        try:
            mlmodel = yaml.safe_load(artifacts.download(MLMODEL, Path(folder)).read_bytes())
        except yaml.YAMLError:
            raise LoadError(f"{place}/{MLMODEL}: not valid YAML") from None
    onnx_file(mlmodel if isinstance(mlmodel, dict) else {}, place)


def _name_model(target: Path) -> None:
    """A single ONNX file is the model, whatever it was called when it was logged; its external data is found by relative names."""
    found = sorted(target.glob("*.onnx"))
    if len(found) == 1:
        found[0].rename(target / MODEL_FILE)


__all__ = ["MlflowSource", "lay_out", "select_ready"]
