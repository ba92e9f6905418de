"""``/healthz``, ``/readyz`` and ``/workers``: answered from the event loop, with no worker asked.

Runs in the front. Liveness says that the loop answers; readiness, that a task would run now.
"""

from __future__ import annotations

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..pool.supervisor import PoolState, Supervisor
from .problem import NOT_READY

RETRY_AFTER_S = 5

_REASONS = {
    PoolState.STARTING: "no worker has run @init yet",
    PoolState.READY: "every worker is being replaced",
    PoolState.DRAINING: "the service is draining: it finishes what runs, and accepts nothing more",
    PoolState.BROKEN: "the pool cannot be kept alive",
}


class Health:
    """The three calls that look at the pool."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(self, _: Request) -> Response:
        pool = self._supervisor
        if pool.state is PoolState.READY and pool.ready_workers:
            return JSONResponse(
                {"status": "ready", "reason": None, "ready_workers": pool.ready_workers}
            )
        reason = PoolState.STARTING if pool.state is PoolState.READY else pool.state
        return NOT_READY.response(
            _REASONS[pool.state].capitalize() + ".",
            retry_after_s=RETRY_AFTER_S,
            reason=reason.value,
            ready_workers=pool.ready_workers,
        )

    async def workers(self, _: Request) -> Response:
        pool = self._supervisor
        body = {
            "workers": [slot.describe() for slot in pool.slots],
            "queue_depth": len(pool.queue),
            "accepting": pool.accepting,
            "state": pool.state.value,
        }
        return Response(to_json(body), media_type="application/json")
