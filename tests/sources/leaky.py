"""Handlers after which a worker is not what it was: leaks, wishes to be replaced, kept frames."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

from pydantic import BaseModel

import ogpu.service
from ogpu.service import expose


class Input(BaseModel):
    number: int = 0


class Output(BaseModel):
    pid: int = 0
    number: int = 0


ballast: list[object] = []


@ogpu.service.init()
def load() -> None:
    time.sleep(float(os.environ.get("LEAKY_INIT_SLEEP_S", "0")))


@expose()
def who(data: Input) -> Output:
    return Output(pid=os.getpid())


@expose()
def leaks(data: Input) -> Output:
    ballast.append(b"x" * data.number)
    return Output(pid=os.getpid())


@expose()
def leaks_and_fails(data: Input) -> Output:
    ballast.append(b"x" * data.number)
    raise ValueError(str(os.getpid()))


@expose()
def leaks_in_a_child(data: Input) -> Output:
    code = f"import time; ballast = b'x' * {data.number}; print(1, flush=True); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    ballast.append(child)
    return Output(pid=os.getpid())


# --- wishes


@expose()
def raises_recycle_worker(data: Input) -> Output:
    raise ogpu.service.RecycleWorker("the cache is beyond repair")


@expose()
def calls_recycle_worker(data: Input) -> Output:
    ogpu.service.RecycleWorker("the cache has grown")
    return Output(pid=os.getpid())


@expose()
def calls_recycle_worker_in_a_thread(data: Input) -> Output:
    thread = threading.Thread(target=ogpu.service.RecycleWorker)
    thread.start()
    thread.join()
    return Output(pid=os.getpid())


# --- frames


class Large:
    """Stands for a tensor."""


alive: "weakref.WeakSet[Large]" = weakref.WeakSet()


def tensor() -> Large:
    large = Large()
    alive.add(large)
    return large


@expose()
def counts_the_living(data: Input) -> Output:
    return Output(number=len(alive))


@expose()
def fails(data: Input) -> Output:
    gc.disable()  # what is collected is collected on purpose
    kept = tensor()
    raise ValueError(f"{kept is None}")


@expose()
def fails_with_a_cause(data: Input) -> Output:
    gc.disable()
    kept = tensor()
    try:
        fails(data)
    except ValueError as error:
        raise KeyError(f"{kept is None}") from error
    return Output()


@expose()
def keeps_its_own_exception(data: Input) -> Output:
    gc.disable()
    kept = tensor()
    try:
        fails(data)
    except ValueError as error:
        failure = error  # a cycle: the exception, its traceback, this frame
    assert kept is failure
    return Output()


@expose()
async def fails_async(data: Input) -> Output:
    gc.disable()
    kept = tensor()
    await asyncio.gather(asyncio.sleep(0), fails_below())
    assert kept is None
    return Output()


async def fails_below() -> None:
    kept = tensor()
    await asyncio.sleep(0)
    raise ValueError(f"{kept is None}")


@expose()
def returns_what_it_should_not(data: Input) -> Output:
    gc.disable()
    return tensor()  # type: ignore[return-value]


@expose(timeout=0.2, grace=20)
def is_stopped(data: Input) -> Output:
    gc.disable()
    kept = tensor()
    time.sleep(60)
    return Output(number=kept is None)


@expose(timeout=0.2, grace=20)
async def is_stopped_async(data: Input) -> Output:
    gc.disable()
    kept = tensor()
    await asyncio.sleep(60)
    return Output(number=kept is None)


ogpu.service.start()
