"""A server with S3's API on this machine, and what is put into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import obstore
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import SourceConfig
from headrace.plugins import open_destination
from headrace.sources.publish import Order, publish
from obstore.store import from_url

BACKENDS = {"onnxruntime": OnnxRuntimeBackend}


def store_of(uri: str) -> Any:
    return from_url(uri, client_options={"allow_http": True})


def put(uri: str, path: str, content: bytes) -> None:
    obstore.put(store_of(uri), path, content)


def objects(uri: str) -> set[str]:
    return {meta["path"] for chunk in obstore.list(store_of(uri)) for meta in chunk}


def publish_to(uri: str, artifact: Path, name: str = "digits", **options: Any) -> int:
    return publish(Order(artifact, name, **options), open_destination(uri, SourceConfig()), BACKENDS).manifest.version
