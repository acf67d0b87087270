"""Publishing into an MLflow model registry: the files become artifacts of a new run, the run a version, and the alias moves last.

MLflow counts versions itself, and the number stands in the manifest, which is signed. So the version is made with the number that
comes next, and taken back when MLflow gave it another: somebody else was faster, or numbers of deleted versions were passed over.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.config import SourceConfig
from headrace.errors import ConfigError
from headrace.model_files import CONFIG_FILES, load_model_config
from headrace.sources.base import Destination
from headrace.sources.manifest import MANIFEST_NAME, SIGNATURE_NAME
from headrace.sources.mlflow_registry import READY, Missing, Registry, files_named_in, open_registry, parse_uri

DEFAULT_EXPERIMENT = "headrace"
FOLDER = "model"
"""In the run's artifacts; a run may have others."""
LONGEST_WAIT = 300
"""Seconds for a version to become ready: MLflow's own default."""


class MlflowDestination(Destination):
    """Owns the run that is being filled, whether the registered model was made for it, and the numbers that MLflow passed over."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        super().__init__(uri, config)
        self._place = parse_uri("--to", uri)
        if self._place.version is not None:
            raise ConfigError(f"--to: expected mlflow:NAME or mlflow:NAME@ALIAS, got {uri!r}: MLflow numbers versions itself")
        self._registry: Registry = open_registry()
        self._run: tuple[str, str] | None = None
        self._has_made_model = False
        self._passed_over: set[int] = set()

    @contextmanager
    def open_model(self, model: str) -> Iterator[Path]:
        """A temporary directory, with the configuration of the latest version, which the new one gets too."""
        if model != self._place.name:
            raise ConfigError(f"--name: expected '{self._place.name}' as in --to {self.uri}, got '{model}'")
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            directory = Path(folder) / model
            directory.mkdir()
            try:
                self._bring_configuration(directory)
                yield directory
            finally:
                self._clean_up()

    def numbers(self, model: str) -> list[int]:
        try:
            there = [version.number for version in self._registry.versions(model)]
        except Missing:
            there = []
        return sorted({*there, *self._passed_over})

    def commit(self, model: str, version: int, staging: Path) -> str | None:
        there = self.numbers(model)
        following = max(there, default=0) + 1
        if version in there:
            return None
        if version != following:
            raise ConfigError(f"--version: MLflow numbers versions itself; the next of {model} is {following}, got {version}")
        run, source = self._log(staging)
        self._make_model(model)
        with _as_os_errors(self._registry):
            made = self._registry.client.create_model_version(model, source, run, await_creation_for=0)
        number = int(made.version)
        try:
            if number != version:
                self._passed_over.add(number)
                self._passed_over.add(version)
                self._delete_version(model, number)
                return None
            self._finish(model, number)
        except BaseException:
            self._delete_version(model, number)
            raise
        self._run = None  # it is the version's now
        self._has_made_model = False
        alias = self._place.alias
        return f"mlflow:{model}/{version}" + (f" as {alias}" if alias else "")

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _bring_configuration(self, directory: Path) -> None:
        name = self._place.name
        try:
            ready = [version.number for version in self._registry.versions(name) if version.status == READY]
        except Missing:
            return
        if not ready:
            return
        with _as_os_errors(self._registry):
            artifacts = self._registry.artifacts(name, ready[-1])
            there = artifacts.list()
            for path in sorted(set(there) & set(CONFIG_FILES)):
                artifacts.download(path, directory)
            for path in sorted(set(there) & files_named_in(load_model_config(directory, name))):
                artifacts.download(path, directory)

    def _log(self, staging: Path) -> tuple[str, str]:
        """All files at the first attempt; at another one only the manifest differs."""
        client = self._registry.client
        with _as_os_errors(self._registry):
            if self._run is None:
                run = client.create_run(self._experiment(), run_name=f"headrace publish {self._place.name}")
                self._run = run.info.run_id, f"{run.info.artifact_uri}/{FOLDER}"
                client.log_artifacts(self._run[0], str(staging), FOLDER)
                beside = [path for path in staging.parent.iterdir() if path.is_file()]
            else:
                beside = [path for name in (MANIFEST_NAME, SIGNATURE_NAME) if (path := staging / name).is_file()]
            for path in beside:
                client.log_artifact(self._run[0], str(path), FOLDER)
        return self._run

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        found = self._registry.client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._registry.client.create_experiment(name))

    def _make_model(self, model: str) -> None:
        try:
            self._registry.aliases(model)
        except Missing:
            with _as_os_errors(self._registry):
                self._registry.client.create_registered_model(model)
            self._has_made_model = True

    def _finish(self, model: str, number: int) -> None:
        """Wait until it is ready, then move the alias: to whoever follows it, this is the publication."""
        deadline = time.monotonic() + LONGEST_WAIT
        while (status := self._registry.version(model, number).status) != READY:
            if status != "PENDING_REGISTRATION" or time.monotonic() > deadline:
                raise OSError(errno.EIO, f"MLflow made {model}/{number}, which is {status}, expected {READY}")
            time.sleep(1)
        if self._place.alias:
            with _as_os_errors(self._registry):
                self._registry.client.set_registered_model_alias(model, self._place.alias, str(number))

    # -- undoing -------------------------------------------------------------------------------------------------------

    def _delete_version(self, model: str, number: int) -> None:
        with suppress(OSError, Missing), self._registry.asking():
            self._registry.client.delete_model_version(model, str(number))

    def _clean_up(self) -> None:
        """What an attempt that was given up has made. MLflow keeps a deleted run until its garbage collection."""
        client, name = self._registry.client, self._place.name
        with suppress(OSError, Missing), self._registry.asking():
            if self._run is not None:
                client.delete_run(self._run[0])
            if self._has_made_model and not self._registry.versions(name):
                client.delete_registered_model(name)
        self._run, self._has_made_model = None, False


@contextmanager
def _as_os_errors(registry: Registry) -> Iterator[None]:
    try:
        with registry.transferring():
            yield
    except Missing as error:
        raise OSError(errno.EIO, f"MLflow registry at {registry.host}: {error}") from None
