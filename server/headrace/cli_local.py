"""A model that a command works on without a server: in a directory, or in any repository that can be served."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.config import SourceConfig
from headrace.errors import ConfigError, HeadraceError

if TYPE_CHECKING:
    from headrace.sources.base import Fetched, ModelRef


@dataclass(frozen=True, slots=True)
class LocalModel:
    """Version `number` of a model of the source `uri`; its files are there until they are released."""

    uri: str
    model: ModelRef
    number: int
    fetched: Fetched

    def is_below_source(self) -> bool:
        """Whether its files are the repository's own, and no copy."""
        root = Path(self.uri.removeprefix("file://")).expanduser()
        return self.fetched.model_directory.resolve().is_relative_to(root.resolve())


FAILED = 1


def exit_code(work: Callable[[], int], subject: str = "", interrupted: str = "interrupted") -> int:
    """What `work` returns; else FAILED, with one line on standard error. Raises ConfigError, which is wrong use."""
    try:
        return work()
    except ConfigError:
        raise
    except HeadraceError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    except KeyboardInterrupt:
        reason = interrupted
    print(f"headrace: {subject}: {reason}" if subject else f"headrace: {reason}", file=sys.stderr)
    return FAILED


def add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="", metavar="REPO", help="a directory of models, or any URI that `serve --models` takes")


async def open_model(model: str, repository: str) -> LocalModel:
    """The newest version that would be served. Raises ConfigError for a name that is not there, HeadraceError for what cannot be had."""
    from headrace.plugins import open_source

    uri, name = _locate(model, repository)
    source = open_source(uri, SourceConfig())
    try:
        listing = await source.list()
        if name in listing.errors:
            raise HeadraceError(listing.errors[name])
        if name not in listing.models:
            raise ConfigError(f"no model '{name}' in {uri}; there are: {', '.join(sorted(listing.models)) or 'none'}")
        found = listing.models[name]
        number = _newest(found)
        return LocalModel(uri, found, number, await source.fetch(found, number))
    finally:
        await source.close()


def _locate(model: str, repository: str) -> tuple[str, str]:
    """(source, the model's name in it)"""
    from headrace.model_files import model_name

    if repository:
        return repository, model
    if not Path(model).is_dir():
        raise ConfigError(f"no directory '{model}'; expected a model's, or --models REPOSITORY with the name of a model in it")
    return model, model_name(Path(model))


def _newest(model: ModelRef) -> int:
    from headrace.lifecycle.policy import select_versions

    numbers = select_versions(list(model.versions), model.config.version_policy)
    if not numbers:
        raise HeadraceError(f"version_policy '{model.config.version_policy}' selects none of its versions")
    return max(numbers)
