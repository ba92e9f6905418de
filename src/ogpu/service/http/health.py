"""``/healthz``, ``/readyz``, ``/workers`` and ``/metrics``; ``/drain`` and ``/resume``.

Runs in the front, and answers from the event loop, with no worker asked. Liveness says that the
loop answers; readiness, that a task would be accepted and run now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pydantic_core import to_json
from starlette.responses import JSONResponse, Response

from ..journal import Journal
from ..metrics import CONTENT_TYPE, Metrics
from ..pool.slot import SlotState
from ..pool.states import PoolState
from ..pool.supervisor import Supervisor
from .problem import NOT_READY, STOPPING

Call = Callable[[], Awaitable[Response]]
_REASONS = {
    PoolState.STARTING: "no worker has run @init yet",
    PoolState.READY: "every worker is being replaced",
    PoolState.DRAINING: "the service is draining: it finishes what runs, and accepts nothing more",
}


class PoolCalls:
    """The calls that look at the pool, and the two that steer it."""

    def __init__(self, supervisor: Supervisor, journal: Journal, metrics: Metrics) -> None:
        self._supervisor = supervisor
        self._journal = journal
        self._metrics = metrics

    def calls(self) -> dict[tuple[str, str], Call]:
        """Return the calls by method and path; none of them has parameters."""
        return {
            ("GET", "/healthz"): self.healthz,
            ("GET", "/readyz"): self.readyz,
            ("GET", "/workers"): self.workers,
            ("POST", "/drain"): self.drain,
            ("POST", "/resume"): self.resume,
            ("GET", "/metrics"): self.metrics,
        }

    async def healthz(self) -> Response:
        """Tell that the event loop answers."""
        return JSONResponse({"status": "alive"})

    async def readyz(self) -> Response:
        """Tell whether a task would be accepted and run now; if not, 503 and the reason."""
        pool, trouble = self._supervisor, self._journal.trouble
        if pool.state is PoolState.READY and pool.ready_workers and trouble is None:
            return JSONResponse({"status": "ready", "reason": None, **self._counts()})
        if pool.broken_by is not None:
            reason, detail = PoolState.BROKEN, str(pool.broken_by)
        elif trouble is not None:
            reason, detail = PoolState.BROKEN, trouble
        else:
            reason = PoolState.STARTING if pool.state is PoolState.READY else pool.state
            detail = _REASONS[pool.state]
            if lost := self._counts()["unkillable_workers"]:
                detail += f"; {lost} slot(s) are lost to workers that SIGKILL does not end"
        return NOT_READY.response(
            detail[:1].upper() + detail[1:] + ".",
            retry_after_s=pool.retry_after_s,
            reason=reason.value,
            **self._counts(),
        )

    def _counts(self) -> dict[str, int]:
        workers = self._supervisor.count_workers()
        unkillable = workers[SlotState.UNKILLABLE.value]
        return {"ready_workers": self._supervisor.ready_workers, "unkillable_workers": unkillable}

    async def workers(self) -> Response:
        """Return the pool, slot by slot."""
        pool = self._supervisor
        body = {
            "workers": [slot.describe() for slot in pool.slots],
            "queue_depth": pool.queue_depth,
            "accepting": pool.accepting,
            "state": pool.state.value,
        }
        return Response(to_json(body), media_type="application/json")

    async def drain(self) -> Response:
        """Accept nothing more (503 and Retry-After), until /resume; what was accepted goes on."""
        self._supervisor.pause()
        return await self.workers()

    async def resume(self) -> Response:
        """Accept tasks again."""
        if not self._supervisor.resume():
            return STOPPING.response("The service is about to end; it cannot be resumed.")
        return await self.workers()

    async def metrics(self) -> Response:
        """Return the figures of the front, as Prometheus reads them."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)
