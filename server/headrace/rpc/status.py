"""Our neutral codes as gRPC's: one table."""

from __future__ import annotations

import grpc

from headrace.errors import Code

STATUS: dict[Code, grpc.StatusCode] = {code: grpc.StatusCode[code.value] for code in Code}
