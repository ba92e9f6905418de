"""The chosen handler on ogpu.service: this one, or the frozen module (serve_frozen.py)."""

import handlers

import ogpu.service

chosen = handlers.chosen()
if hasattr(ogpu.service, "prepare") and hasattr(chosen, "prepare"):
    ogpu.service.prepare()(chosen.prepare)
    ogpu.service.init()(chosen.load)
else:
    ogpu.service.init()(handlers.prepare_and_load)
ogpu.service.expose(timeout=chosen.TIMEOUT_S)(chosen.handle)

if __name__ == "__main__":
    ogpu.service.start()
