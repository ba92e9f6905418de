"""What handlers do inside: threads, event loops, signals, warnings, files beside them."""
import asyncio
import atexit
import concurrent.futures
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings

logging.basicConfig(level=logging.INFO, format="%(name)s | %(message)s")
log = logging.getLogger("inside")
warnings.filterwarnings("ignore", category=UserWarning)

import ogpu.service
from pydantic import BaseModel

STOPPING = False


def _stop(signum, frame):
    global STOPPING
    STOPPING = True
    log.info("stopping")
    sys.exit(0)


signal.signal(signal.SIGTERM, _stop)
signal.signal(signal.SIGINT, _stop)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
atexit.register(lambda: log.info("goodbye"))

jobs = None


class Work(BaseModel):
    n: int = 3


class Done(BaseModel):
    values: list[int]


def _consume():
    while True:
        n, results = jobs.get()
        results.put(n * n)


@ogpu.service.init()
def begin():
    """A queue and a thread for the life of the service."""
    global jobs
    jobs = queue.Queue()
    threading.Thread(target=_consume, name="consumer", daemon=True).start()
    log.info("consumer started")


@ogpu.service.expose()
def queued(work: Work) -> Done:
    results = queue.Queue()
    for n in range(work.n):
        jobs.put((n, results))
    return Done(values=[results.get(timeout=5) for _ in range(work.n)])


@ogpu.service.expose(timeout=10)
def threads(work: Work) -> Done:
    values = []
    crew = [threading.Thread(target=values.append, args=(n,)) for n in range(work.n)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        values += pool.map(lambda n: -n, range(work.n))
    warnings.warn("nobody reads this", UserWarning)
    return Done(values=values)


async def _square(n):
    await asyncio.sleep(0)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"print({n} ** 2)", stdout=subprocess.PIPE
    )
    said, _ = await process.communicate()
    return int(said)


async def _squares(n):
    return await asyncio.gather(*map(_square, range(n)))


@ogpu.service.expose(timeout=10)
def loops(work: Work) -> Done:
    values = asyncio.run(_squares(work.n))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        values += loop.run_until_complete(_squares(1))
    finally:
        loop.close()
        asyncio.set_event_loop(None)
    return Done(values=values)


@ogpu.service.expose()
def shells(work: Work) -> Done:
    lines = subprocess.check_output("for i in 1 2 3; do echo $i; done", shell=True, text=True)
    pid = os.fork()
    if pid == 0:
        os._exit(work.n)
    _, status = os.waitpid(pid, 0)
    return Done(values=[*map(int, lines.split()), os.waitstatus_to_exitcode(status)])


try:
    ogpu.service.start()
finally:
    log.info("after start")
