"""Fine-tune worker: runs a trainer as a subprocess, packs the adapter, returns it as base64."""
import base64
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ogpu.service
from pydantic import BaseModel

HERE = Path(__file__).resolve().parent
LOG_DIR = Path(os.environ.get("WORKER_LOG_DIR", "/workspace/logs"))
_PHASE_LOGGER = logging.getLogger("finetune.phase")
_PROGRESS_LOCK = None
_PROGRESS = {"phase": None}


def _progress_lock():
    global _PROGRESS_LOCK
    if _PROGRESS_LOCK is None:
        _PROGRESS_LOCK = threading.Lock()
    return _PROGRESS_LOCK


def _phase(name, **fields):
    line = " ".join([f"PHASE={name}", *(f"{k}={v}" for k, v in fields.items())])
    ogpu.service.logger.info("%s", line)
    _PHASE_LOGGER.info("%s", line)
    with _progress_lock():
        _PROGRESS["phase"] = name


class FineTuneInput(BaseModel):
    model_config = {"extra": "ignore"}

    base_model: str = ""
    preset: str = "fast"
    num_epochs: int = 2
    learning_rate: float = 1e-4
    timeout_seconds: float = 7200
    openreef: dict | None = None

    @classmethod
    def model_validate(cls, obj, *args, **kwargs):
        """Accept wrappers: {function_name, data: {...}}"""
        if isinstance(obj, dict) and isinstance(obj.get("data"), dict):
            obj = obj["data"]
        return super().model_validate(obj, *args, **kwargs)


class FineTuneOutput(BaseModel):
    status: str
    job: str
    adapter_base64: str | None = None
    artifact_sha256: str | None = None
    error: str | None = None


def _setup_file_logging():
    LOG_DIR.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(LOG_DIR / "worker.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(name)s: %(message)s"))
    for name in ("ogpu.service", "finetune.phase"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        sys.stderr.reconfigure(line_buffering=True)
    except Exception:
        pass


@ogpu.service.init()
def load_model():
    _setup_file_logging()
    _phase("runtime_ready", python=sys.version_info[0])


def _heartbeat(stop):
    while not stop.wait(0.01):
        with _progress_lock():
            phase = _PROGRESS["phase"]
        if phase == "train_start":
            ogpu.service.logger.debug("heartbeat sent: %s", phase)
            return


@ogpu.service.expose(timeout=7200)
def finetune(data: FineTuneInput) -> FineTuneOutput:
    job = os.environ.get("OGPU_TASK_ADDRESS") or getattr(ogpu.service, "task_id", "unknown-task")
    work_dir = Path(tempfile.mkdtemp(prefix="finetune-"))
    stop = threading.Event()
    beat = threading.Thread(target=_heartbeat, args=(stop,), daemon=True)
    beat.start()
    try:
        config = {"base_model": data.base_model, "steps": 3, "output_dir": str(work_dir / "out")}
        (work_dir / "config.json").write_text(json.dumps(config))
        _phase("train_start", base_model=data.base_model)
        beat.join(5)
        with (work_dir / "train.log").open("w") as log:
            result = subprocess.run(
                [sys.executable, str(HERE / "train.py"), str(work_dir / "config.json")],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=work_dir,
                env={**os.environ, "LORA": "lora"},
                timeout=data.timeout_seconds,
            )
        if result.returncode != 0:
            tail = (work_dir / "train.log").read_text().strip().splitlines()[-1]
            ogpu.service.logger.error("Training failed: %s", tail)
            return FineTuneOutput(status="failed", job=job, error=tail)
        adapter = (work_dir / "out" / "adapter_model.safetensors").read_bytes()
        return FineTuneOutput(
            status="completed",
            job=job,
            adapter_base64=base64.b64encode(adapter).decode(),
            artifact_sha256=hashlib.sha256(adapter).hexdigest()[:16],
        )
    except subprocess.TimeoutExpired:
        error = f"Training exceeded timeout ({data.timeout_seconds}s)"
        return FineTuneOutput(status="failed", job=job, error=error)
    except Exception as e:
        ogpu.service.logger.exception("Training failed: %s", e)
        return FineTuneOutput(status="failed", job=job, error=str(e))
    finally:
        stop.set()
        shutil.rmtree(work_dir, ignore_errors=True)
        _phase("job_end")


if __name__ == "__main__":
    ogpu.service.start()
