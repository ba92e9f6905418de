"""A source that replaces start(): its handlers want to know the address of their task."""
import os
import socket
import threading
import time

import ogpu.service
import ogpu.service.config as sdk_config
from pydantic import BaseModel

# Published for a port that its operator chooses.
sdk_config.SERVICE_HOST = os.environ.get("HOST", sdk_config.SERVICE_HOST)
sdk_config.SERVICE_PORT = int(os.environ.get("PORT", sdk_config.SERVICE_PORT))

READY = False
GO_ON = threading.Event()


class JobInput(BaseModel):
    seconds: float = 0
    fail: bool = False


class JobOutput(BaseModel):
    status: str
    task: str
    ready: bool


@ogpu.service.init()
def load():
    global READY
    READY = True


@ogpu.service.expose(timeout=0.4)
def job(data: JobInput) -> JobOutput:
    if data.fail:
        raise ValueError("no such dataset")
    GO_ON.wait(data.seconds)
    task = os.environ.get("OGPU_TASK_ADDRESS", "unknown-task")
    return JobOutput(status="completed", task=task, ready=READY)


def _install_task_address_patch():
    import ogpu.service as svc_mod
    import ogpu.service.server as server_mod

    if getattr(server_mod, "_task_address_patched", False):
        return

    def start_patched():
        import uvicorn
        from fastapi import BackgroundTasks, FastAPI, HTTPException

        from ogpu.service.config import CALLBACK_URL, SERVICE_HOST, SERVICE_PORT
        from ogpu.service.handler import get_handlers, get_init_handler
        from ogpu.service.logger import logger
        from ogpu.service.server import lifespan, send_callback

        logger.info("Starting OpenGPU Service server (task_address patch)...")
        assert get_init_handler() is load
        busy = threading.Lock()
        app = FastAPI(title="OpenGPU Service", version="0.1.0", lifespan=lifespan)

        def create_endpoint(handler, input_model, function_name):
            async def endpoint(
                task_address: str, data: input_model, background_tasks: BackgroundTasks
            ):
                if not busy.acquire(blocking=False):
                    raise HTTPException(409, detail="already training")

                def runner():
                    os.environ["OGPU_TASK_ADDRESS"] = task_address
                    try:
                        result = handler(data)
                        if result:
                            logger.task_success(
                                f"[{task_address}] Function: `{function_name}` completed successfully"
                            )
                            send_callback(task_address, result.model_dump())
                    except Exception as e:
                        logger.task_fail(f"[{task_address}] Error in `{function_name}`: {e}")
                    finally:
                        os.environ.pop("OGPU_TASK_ADDRESS", None)
                        busy.release()

                background_tasks.add_task(runner)
                return {"task_address": task_address, "status": "accepted"}

            return endpoint

        for handler, input_model, _output_model in get_handlers():
            endpoint = create_endpoint(handler, input_model, handler.__name__)
            app.post(f"/run/{handler.__name__}/{{task_address}}", status_code=202)(endpoint)

        listener = socket.create_server((SERVICE_HOST, SERVICE_PORT))
        host, port = listener.getsockname()
        logger.info(f"Listening on http://{host}:{port}, results go to {bool(CALLBACK_URL)}")
        config = uvicorn.Config(app, log_level="warning")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            GO_ON.set()
            listener.close()

    server_mod.start = start_patched
    svc_mod.start = start_patched
    server_mod._task_address_patched = True


if __name__ == "__main__":
    _install_task_address_patch()
    ogpu.service.start()
