"""The chosen handler on ogpu.service: this one, or the frozen module (serve_frozen.py)."""

import os

import handlers

import ogpu.service

chosen = handlers.chosen()
BATCH_SIZE = int(os.environ.get("BENCHMARK_BATCH_SIZE", "1"))

if hasattr(ogpu.service, "prepare") and hasattr(chosen, "prepare"):
    ogpu.service.prepare()(chosen.prepare)
    ogpu.service.init()(chosen.load)
else:
    ogpu.service.init()(handlers.prepare_and_load)

if BATCH_SIZE > 1:
    in_batches = ogpu.service.expose(
        timeout=chosen.TIMEOUT_S, batch_size=BATCH_SIZE, batch_window=0.01
    )
    in_batches(chosen.handle_many)
else:
    ogpu.service.expose(timeout=chosen.TIMEOUT_S)(chosen.handle)

if __name__ == "__main__":
    ogpu.service.start()
