"""What a transport is: sockets, and the services behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headrace.rpc.admin import AdminService
from headrace.rpc.control import ControlService
from headrace.rpc.feedback import FeedbackService
from headrace.rpc.health import HealthService
from headrace.rpc.inference import InferenceService


@dataclass(frozen=True, slots=True)
class Services:
    """What every transport serves; without `admin` or `feedback` that service is unknown."""

    inference: InferenceService
    control: ControlService
    health: HealthService
    admin: AdminService | None = None
    feedback: FeedbackService | None = None

    def close(self) -> None:
        """End every watch and every load by request, after the models have announced the stop."""
        self.health.close()
        self.control.close()
        if self.admin is not None:
            self.admin.close()


class Transport(Protocol):
    """One gRPC implementation. Event loop only; each method is called once, in this order."""

    async def start(self) -> list[str]:
        """Bind and serve. Returns the bound addresses, ports filled in. Raises ConfigError for what cannot be bound."""

    async def stop(self, grace: float) -> None:
        """Tell clients to go elsewhere, let calls in flight end within `grace` seconds (streams once they have their answers), cancel
        the rest."""
