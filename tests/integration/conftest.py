"""Every test of the protocol runs on every transport; a store with S3's API for those that need one."""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from served_models import TRANSPORTS, Serve, serve_on


@pytest.fixture(params=list(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(transport: str) -> Serve:
    return serve_on(transport)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The server's address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty one, of this test's own, with what it takes to use it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {"ACCESS_KEY_ID": "somebody", "SECRET_ACCESS_KEY": "s3cret-of-somebody", "REGION": "us-east-1", "ENDPOINT_URL": s3}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = "b" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    urllib.request.urlopen(urllib.request.Request(f"{s3}/{name}", method="PUT")).close()
    return f"s3://{name}/team/models"
