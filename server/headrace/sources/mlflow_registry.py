"""An MLflow model registry as its source and destination need it. Blocking; the extra `mlflow` is imported at first use.

MLflow's own environment variables say where it is and who we are; MLflow reads them itself, so that whatever works for its other
clients works here. Nothing of them gets into a message: errors name the host alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from headrace.config import ModelConfig
from headrace.errors import ConfigError, HeadraceError, LoadError
from headrace.sources.base import is_version_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

READY = "READY"
SCHEME = "mlflow:"

_DEFAULTS = {
    # MLflow's own are 7 retries and 120 s: a registry that is away would hold a thread for minutes, and a stopping server with
    # it. Whoever asks the registry asks again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # standard error has our log lines
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would report to its makers, of which nobody who runs a server was asked
}
"""Variables that are set for MLflow unless they are already; it takes these settings in no other way."""


class Missing(Exception):
    """The registry answered, and has no such model, version or alias. The text says which."""


@dataclass(frozen=True, slots=True)
class Place:
    """What mlflow:NAME, mlflow:NAME/VERSION or mlflow:NAME@ALIAS names. At most one of `version` and `alias`."""

    name: str
    version: int | None = None
    alias: str | None = None


def parse_uri(option: str, uri: str) -> Place:
    """Raises ConfigError that names `option`."""
    text = uri.removeprefix(SCHEME)
    before, at, alias = text.rpartition("@")
    name, slash, version = (before, "", "") if at else text.partition("/")
    if slash and not is_version_name(version):
        name = ""
    # MLflow itself refuses '/' and ':', and mistakes '?', '#' and '%' when it looks for artifacts. A name that begins with a dot or
    # an underscore is none in Headrace, see sources/publish.py.
    is_name = name.isprintable() and not re.search(r"[/:\\?#%]", name) and not name.startswith((".", "_")) and name == name.strip()
    if not name or not is_name or (at and not re.fullmatch(r"[\w-]+", alias)):
        raise ConfigError(f"{option}: expected mlflow:NAME, mlflow:NAME/VERSION or mlflow:NAME@ALIAS, got {uri!r}")
    return Place(name, int(version) if slash else None, alias if at else None)


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """What never changes of a version, and its status."""

    number: int
    status: str
    status_message: str
    run_id: str
    origin: str
    created: int

    @property
    def digest(self) -> str:
        """Of what makes it this version and no other. `created`: a model that was deleted and made anew counts from 1 again."""
        return hashlib.sha256(repr((self.number, self.run_id, self.origin, self.created)).encode()).hexdigest()[:16]


class Registry:
    """Owns a client. Raises Missing for what is not there and OSError for what cannot be asked now; from any thread."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self.client = client
        self.host = urlsplit(uri).hostname or uri.partition(":")[0]

    def __repr__(self) -> str:
        return f"Registry({self.host})"

    def aliases(self, name: str) -> dict[str, int]:
        with self.asking():
            model = self.client.get_registered_model(name)
        return {alias: int(version) for alias, version in model.aliases.items()}

    def version(self, name: str, number: int) -> RegisteredVersion:
        with self.asking():
            return _read_version(self.client.get_model_version(name, str(number)))

    def versions(self, name: str) -> list[RegisteredVersion]:
        """By number."""
        found: list[RegisteredVersion] = []
        token = None
        quoted = name.replace("'", "\\'")
        while True:
            with self.asking():
                page = self.client.search_model_versions(f"name = '{quoted}'", max_results=200, page_token=token)
            found += map(_read_version, page)
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number)

    def artifacts(self, name: str, number: int) -> Artifacts:
        return Artifacts(self, f"models:/{name}/{number}")

    @contextmanager
    def asking(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise Missing(scrub(error)) from None
            raise self.failure(error) from None  # its chain has the address, perhaps with a password in it
        except ImportError as error:
            raise ConfigError(f"mlflow: the registry at {self.host} or its artifacts need another package: {scrub(error)}") from None

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """As `asking`, also for artifacts, which MLflow moves by whatever library their store needs."""
        try:
            with self.asking():
                yield
        except (Missing, HeadraceError):
            raise
        except Exception as error:  # these libraries have no common base; their texts may have signed addresses in them
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise
            raise self.failure(error) from None

    def failure(self, error: Exception) -> OSError:
        """`error` of MLflow, or of whatever it fetches artifacts by, in words that may be shown."""
        kinds = {type(each).__name__ for each in (error, error.__context__, error.__cause__) if each is not None}
        code = getattr(error, "error_code", "")
        if kinds & {"ConnectTimeout", "ReadTimeout", "Timeout"}:
            reason = "did not answer in time"
        elif "ConnectionError" in kinds:
            reason = "cannot be reached"
        elif code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"):
            reason = f"refused our credentials ({code}); expected MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, that may do this"
        else:
            reason = scrub(error)
        return OSError(errno.EIO, f"MLflow registry at {self.host}: {reason}")


class Artifacts:
    """The files of one version, wherever MLflow keeps them. Owns the library's access to them; one thread at a time."""

    def __init__(self, registry: Registry, uri: str) -> None:
        self._registry = registry
        self._uri = uri
        self._opened: Any = None

    def list(self, folder: str = "") -> dict[str, bool]:
        """Path -> whether it is a directory, of what is directly in `folder`. Raises Missing and OSError."""
        with self._registry.transferring():
            found = self._repository().list_artifacts(folder or None)
        for entry in found:
            _check_inside(entry.path)
        return {entry.path: entry.is_dir for entry in found}

    def walk(self, folder: str = "") -> Iterator[str]:
        for path, is_directory in sorted(self.list(folder).items()):
            if is_directory:
                yield from self.walk(path)
            else:
                yield path

    def download(self, path: str, folder: Path) -> Path:
        """Into `folder`, below which it keeps its path."""
        with self._registry.transferring():
            self._repository().download_artifacts(path, str(folder))
        target = folder / path
        if not target.is_file():
            raise OSError(errno.EIO, f"MLflow registry at {self._registry.host}: artifact {path!r} did not come")
        return target

    def _repository(self) -> Any:
        """What mlflow.artifacts works with; that itself would put a path into an address, where '?', '#' and '%' mean something."""
        if self._opened is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            self._opened = get_artifact_repository(self._uri)
        return self._opened


def open_registry() -> Registry:
    """Raises ConfigError. Sends nothing."""
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        import mlflow
    except ImportError:
        raise ConfigError("models from MLflow need the package mlflow-skinny: pip install 'headrace[mlflow]'") from None
    if not (os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")):
        # MLflow would quietly make a database in the working directory.
        raise ConfigError("mlflow: expected the registry's address in MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI")
    from mlflow.exceptions import MlflowException

    try:
        return Registry(mlflow.MlflowClient(), mlflow.get_registry_uri())
    except MlflowException as error:
        raise ConfigError(f"mlflow: {scrub(error)}") from None


def scrub(error: Exception) -> str:
    """The error's text on one line, without what addresses carry: passwords and signatures."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", text)
    text = re.sub(r"\?\S+", "", text)
    return text if len(text) <= 300 else text[:300] + "…"


def _read_version(entity: Any) -> RegisteredVersion:
    return RegisteredVersion(
        number=int(entity.version),
        status=str(entity.status),
        status_message=str(entity.status_message or ""),
        run_id=str(entity.run_id or ""),
        origin=str(entity.source or ""),
        created=int(entity.creation_timestamp or 0),
    )


def _check_inside(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or "\\" in path:
        raise OSError(errno.EIO, f"MLflow artifact {path!a}: expected a path inside the version")


# -- which files -------------------------------------------------------------------------------------------------------

MLMODEL = "MLmodel"

_MLFLOW_FILES = {
    MLMODEL, "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta", "input_example.json",
    "serving_input_example.json", "metadata", "code", "extra_files",
}  # fmt: skip
"""What MLflow puts beside a model's own files."""


def is_mlflow_file(path: str) -> bool:
    return path.split("/")[0] in _MLFLOW_FILES


def onnx_file(mlmodel: Mapping[str, Any], place: str) -> str:
    """The path of the ONNX model that an MLmodel names. Raises LoadError for another kind of model."""
    flavors = mlmodel.get("flavors")
    flavors = flavors if isinstance(flavors, dict) else {}
    flavor = flavors.get("onnx")
    path = flavor.get("data") if isinstance(flavor, dict) else None
    if not isinstance(path, str):
        there = ", ".join(sorted(map(str, flavors))) or "none"
        raise LoadError(f"{place}/{MLMODEL}: expected the flavour onnx with its file, found {there}")
    return path


def files_named_in(config: ModelConfig) -> set[str]:
    """What lies beside model.toml because it names it."""
    return {name for name in (config.signature_key, *(tensor.labels for tensor in config.outputs)) if name}


__all__ = [
    "Artifacts",
    "Missing",
    "Place",
    "RegisteredVersion",
    "Registry",
    "files_named_in",
    "is_mlflow_file",
    "onnx_file",
    "open_registry",
    "parse_uri",
]
