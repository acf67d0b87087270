"""Every test of the protocol runs on every transport."""

from __future__ import annotations

import pytest
from served_models import TRANSPORTS, Serve, serve_on


@pytest.fixture(params=list(TRANSPORTS))
def serve(request: pytest.FixtureRequest) -> Serve:
    return serve_on(request.param)
