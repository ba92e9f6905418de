"""Handlers that are asked to stop at their deadline: what they do until then, and what after.

All of them are past their deadline in a moment, and have a grace that is long enough, unless they
have none of their own.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

from pydantic import BaseModel, field_serializer, field_validator

import ogpu.service
from ogpu.service import TaskTimeout, expose
from ogpu.service.wire import ASK_SIGNAL


class Input(BaseModel):
    text: str = ""
    number: float = 0

    @field_validator("text")
    @classmethod
    def judge(cls, text: str) -> str:
        if text == "slow" and "OGPU_TASK_ADDRESS" in os.environ:  # in the worker, not in the front
            time.sleep(60)
        return text


class Output(BaseModel):
    text: str = ""
    pid: int = 0
    number: float = 0

    @field_serializer("text")
    def write(self, text: str) -> str:
        if text == "slow":
            time.sleep(60)
        return text


inits = 0
events: list[str] = []  # what has happened in this worker
pool = concurrent.futures.ThreadPoolExecutor(2)


@ogpu.service.init()
def load() -> None:
    global inits
    inits += 1
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    pool.submit(print, "the pool has a thread").result()


@expose()
def facts(data: Input) -> Output:
    """Tell about the worker: ``text`` is an expression, or empty."""
    return Output(text=str(eval(data.text or "''")), pid=os.getpid(), number=inits)


@expose()
async def counts_asyncio_tasks(data: Input) -> Output:
    return Output(number=len(asyncio.all_tasks() - {asyncio.current_task()}))


# --- stopped in the middle of something


@expose(timeout=0.2, grace=20)
def sleeps(data: Input) -> Output:
    time.sleep(60)
    return Output()


@expose(timeout=0.2, grace=20)
def computes(data: Input) -> Output:
    while True:
        pass


@expose(timeout=0.2, grace=20)
def tries_again_for_ever(data: Input) -> Output:
    while True:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - as sources do
            events.append("a failure was tried again")


@expose(timeout=0.2, grace=20)
def waits_for_a_lock(data: Input) -> Output:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return Output()


@expose(timeout=0.2, grace=20)
def waits_for_a_queue(data: Input) -> Output:
    queue.Queue().get()
    return Output()


@expose(timeout=0.2, grace=20)
def waits_for_a_process(data: Input) -> Output:
    subprocess.run(["sleep", "60"], check=True)
    return Output()


@expose(timeout=0.2, grace=20)
def waits_for_its_own_loop(data: Input) -> Output:
    asyncio.run(asyncio.sleep(60))
    return Output()


@expose(timeout=0.2, grace=20)
def reports_progress_for_ever(data: Input) -> Output:
    while True:
        ogpu.service.current_task().progress(0.5, "still at it")


@expose(timeout=0.2, grace=20)
def validates(data: Input) -> Output:
    return Output()


@expose(timeout=0.2, grace=20)
def serialises(data: Input) -> Output:
    return Output(text="slow")


@expose(timeout=0.2, grace=20)
async def awaits(data: Input) -> Output:
    await asyncio.sleep(60)
    return Output()


@expose(timeout=0.2, grace=20)
async def computes_between_awaits(data: Input) -> Output:
    await asyncio.sleep(0.01)
    while True:
        pass


@expose(timeout=0.2, grace=20)
async def awaits_with_a_timeout_of_its_own(data: Input) -> Output:
    await asyncio.wait_for(asyncio.sleep(60), 30)
    return Output()


@expose(timeout=0.2, grace=20)
async def awaits_others(data: Input) -> Output:
    await asyncio.gather(*(asyncio.sleep(60) for _ in range(3)))
    return Output()


@expose(timeout=0.2, grace=20)
async def awaits_a_group(data: Input) -> Output:
    if sys.version_info < (3, 11):
        await asyncio.sleep(60)
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(60))
    return Output()


@expose(timeout=0.2, grace=20)
async def awaits_in_finally(data: Input) -> Output:
    try:
        await asyncio.sleep(60)
    finally:
        for _ in range(3):
            await asyncio.sleep(0.01)
        events.append("awaited in finally")
    return Output()


@expose(timeout=0.2, grace=20)
async def swallows_a_cancelled_child(data: Input) -> Output:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("a child was cancelled")

    await asyncio.create_task(stubborn())
    await asyncio.sleep(60)
    return Output()


# --- what it does when it is asked


@expose(timeout=0.2, grace=20)
def cleans_up(data: Input) -> Output:
    try:
        time.sleep(60)
    except TaskTimeout:
        os.kill(os.getpid(), ASK_SIGNAL)
        time.sleep(0.05)
        events.append("cleaned up")
        raise
    return Output()


@expose(timeout=0.2, grace=20)
def returns_after_all(data: Input) -> Output:
    try:
        time.sleep(60)
    except TaskTimeout:
        events.append("returned after all")
    return Output(text="a result that nobody wants")


@expose(timeout=0.2, grace=20)
async def returns_after_all_async(data: Input) -> Output:
    try:
        await asyncio.sleep(60)
    except TaskTimeout:
        await asyncio.sleep(0.01)
        events.append("returned after all")
    return Output(text="a result that nobody wants")


@expose(timeout=0.2, grace=20)
def fails_while_it_cleans_up(data: Input) -> Output:
    try:
        time.sleep(60)
    finally:
        raise OSError("the disk is full")


@expose(timeout=0.2, grace=0.3)
def refuses(data: Input) -> Output:
    while True:
        with contextlib.suppress(TaskTimeout):
            the_place_where_it_hangs()


def the_place_where_it_hangs() -> None:
    time.sleep(60)


@expose(timeout=0.2, grace=0.3)
def holds_the_gil(data: Input) -> Output:
    return Output(number=sum(range(10**14)))  # a loop in C; sleep() would end at the signal


@expose(timeout=0.2, grace=20)
def takes_its_time(data: Input) -> Output:
    try:
        time.sleep(60)
    finally:
        print("asked to stop")
        time.sleep(60)
    return Output()


@expose(timeout=0.2)
def has_no_grace_of_its_own(data: Input) -> Output:
    try:
        time.sleep(60)
    except TaskTimeout:
        events.append("asked")
        raise
    return Output()


@expose(timeout=0.2, grace=0)
def wants_no_grace(data: Input) -> Output:
    time.sleep(60)
    return Output()


# --- what it leaves


@expose(timeout=0.2, grace=20)
def leaves_a_thread(data: Input) -> Output:
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    time.sleep(60)
    return Output()


@expose(timeout=0.2, grace=20)
def leaves_a_call_in_a_pool(data: Input) -> Output:
    pool.submit(time.sleep, 60).result()
    return Output()


@expose(timeout=0.2, grace=20)
def leaves_a_process(data: Input) -> Output:
    subprocess.Popen(["sleep", "3600"]).wait()
    return Output()


@expose(timeout=0.2, grace=20)
def leaves_a_process_of_a_thread(data: Input) -> Output:
    def start() -> None:
        subprocess.Popen(["sleep", "3600"])
        pool.submit(print).result()

    pool.submit(start).result()
    time.sleep(60)
    return Output()


@expose(timeout=0.2, grace=20)
def leaves_an_orphan(data: Input) -> Output:
    """A grandchild in a session of its own, without our environment, whose parent has ended."""
    code = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(3600)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "/bin"})
    time.sleep(60)
    return Output()


kept: list[object] = []


@expose(timeout=0.2, grace=20)
async def leaves_an_asyncio_task_behind(data: Input) -> Output:
    kept.append(asyncio.create_task(asyncio.sleep(3600)))
    await asyncio.sleep(60)
    return Output()


@expose(timeout=0.2, grace=20)
def leaves_nothing(data: Input) -> Output:
    """Threads that end, processes that are killed, a pool that is idle: all is in order."""
    child = subprocess.Popen(["sleep", "3600"])
    done = threading.Event()
    threading.Thread(target=done.wait).start()
    pool.submit(print).result()
    try:
        time.sleep(60)
    finally:
        child.kill()
        done.set()
    return Output()


# --- at the edge


@expose(timeout=0.02, grace=20)
def ends_at_the_deadline(data: Input) -> Output:
    until = time.monotonic() + 0.02 + random.uniform(-0.002, 0.001)
    while time.monotonic() < until:
        ogpu.service.current_task().progress(0.5)
    return Output(pid=os.getpid())


@expose(timeout=0.02, grace=20)
async def ends_at_the_deadline_async(data: Input) -> Output:
    wait_s = 0.02 + random.uniform(-0.002, 0.001)
    for _ in range(10):
        await asyncio.sleep(wait_s / 10 - 0.0001)
    return Output(pid=os.getpid())


@expose(timeout=0.2, grace=20)
def asks_its_fork(data: Input) -> Output:
    """Fork a child that goes on with a copy of everything, and send it the signal."""
    pid = os.fork()
    try:
        time.sleep(1 if pid == 0 else 60)
    except TaskTimeout:
        if pid == 0:
            os._exit(9)
        os.kill(pid, ASK_SIGNAL)
        events.append(f"its fork: {os.waitpid(pid, 0)[1]}")
        raise
    if pid == 0:
        os._exit(0)
    return Output()


assert signal.getsignal(ASK_SIGNAL) is signal.SIG_DFL  # while this is imported it has no meaning

ogpu.service.start()
