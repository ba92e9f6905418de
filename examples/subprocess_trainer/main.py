"""A source whose handler starts a training: a launcher, which starts processes of its own.

1. The handler starts launch.py and reads what the training prints: progress, and log lines.
2. The training ends well: the result is what its last checkpoint says.
3. It fails: the task fails, with the exit code and the last lines.
4. The deadline: `TaskTimeout` is raised here. SIGTERM tells the training to write a checkpoint; one
   that has not ended when the grace is over is killed with all its processes, and so is the worker.
5. The same task_address again goes on from the checkpoint.
"""

import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

from pydantic import BaseModel, Field

import ogpu.service

HERE = Path(__file__).resolve().parent
CHECKPOINTS = Path(os.environ.get("CHECKPOINTS", "checkpoints")).resolve()
LAST_LINES = 10  # in the error of a training that has failed
GRACE_S = 2  # longer than it takes to end an epoch and to write a checkpoint
PROGRESS = re.compile(r"epoch (?P<done>\d+)/(?P<all>\d+) loss (?P<loss>\S+)")


class Training(BaseModel):
    epochs: int = Field(200, ge=1, description="how often to go through the data")
    learning_rate: float = Field(0.05, gt=0, description="above about 1 it does not converge")
    ranks: int = Field(2, ge=2, le=8, description="processes that share the work")
    stubborn: bool = Field(default=False, description="have the ranks ignore SIGTERM")


class Trained(BaseModel):
    epochs: int
    loss: float
    weights: list[float]
    resumed_from: int = Field(description="epochs that an earlier run had done")


class Checkpoint(BaseModel):
    epoch: int
    loss: float
    weights: list[float]


class TrainingFailedError(Exception):
    """The training has ended with an exit code other than 0, or without a checkpoint."""


@ogpu.service.expose(grace=GRACE_S)  # how long a training may take: OGPU_TASK_TIMEOUT
def train(data: Training) -> Trained:
    """Train a linear model in a tree of processes; the same address again goes on."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    path = CHECKPOINTS / f"{ogpu.service.current_task().address}.json"
    before = read_checkpoint(path)
    run_training(command_line(data, path))
    after = read_checkpoint(path)
    if after is None:
        raise TrainingFailedError(f"the training has left no checkpoint at {path}")
    return Trained(
        epochs=after.epoch,
        loss=after.loss,
        weights=after.weights,
        resumed_from=before.epoch if before else 0,
    )


def read_checkpoint(path: Path) -> Checkpoint | None:
    return Checkpoint.model_validate_json(path.read_bytes()) if path.exists() else None


def command_line(data: Training, checkpoint: Path) -> list[str]:
    """Return what `accelerate launch --num_processes 2 train.py …` would be elsewhere."""
    return [
        *(sys.executable, str(HERE / "launch.py"), "--ranks", str(data.ranks)),
        *(str(HERE / "train.py"), "--epochs", str(data.epochs)),
        *("--learning-rate", str(data.learning_rate), "--checkpoint", str(checkpoint)),
        *(["--stubborn"] if data.stubborn else []),
    ]


def run_training(command: list[str]) -> None:
    """Run a training to its end, and tell how far it is.

    Raises:
        TrainingFailedError: its exit code is not 0.
    """
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        assert launcher.stdout is not None
        try:
            for line in launcher.stdout:
                last_lines.append(line)
                tell(line)
        except ogpu.service.TaskTimeout:
            launcher.terminate()
            # Without a limit: whatever does not end within the grace is killed, this wait as well.
            rest, _ = launcher.communicate()
            print(rest, end="", flush=True)
            raise
    if launcher.returncode != 0:
        raise TrainingFailedError(
            f"exit code {launcher.returncode}, after these lines:\n{''.join(last_lines)}"
        )


def tell(line: str) -> None:
    """Pass on a line: to the task's log, and as its progress."""
    print(line, end="", flush=True)
    if found := PROGRESS.match(line):
        fraction = int(found["done"]) / int(found["all"])
        ogpu.service.current_task().progress(fraction, line.strip())


if __name__ == "__main__":
    ogpu.service.start()
