"""A source with every kind of handler that the tests need: good, failing, hanging, dying."""

import asyncio
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone

from pydantic import BaseModel, field_validator

import ogpu.service


class Input(BaseModel):
    text: str = ""
    number: float = 0

    @field_validator("text")
    @classmethod
    def judge(cls, text: str) -> str:
        if text == "unacceptable":
            raise ValueError("this text is unacceptable")
        if text == "slow":
            time.sleep(0.15)
        if text == "broken":
            raise KeyError("a defect of the source")
        return text


class Output(BaseModel):
    text: str = ""
    pid: int = 0
    when: datetime | None = None
    number: float = 0


class Other(BaseModel):
    text: str = ""


inits = 0


@ogpu.service.init()
def load() -> None:
    global inits
    inits += 1
    if delay := os.environ.get("ZOO_INIT_SLEEP_S"):
        time.sleep(float(delay))
    if awaited := os.environ.get("ZOO_INIT_WAITS_FOR"):
        while not os.path.exists(awaited):
            time.sleep(0.01)
    if os.environ.get("ZOO_INIT_RAISES"):
        raise RuntimeError("the model file is missing")
    if marker := os.environ.get("ZOO_INIT_FAILS_AFTER_FIRST"):
        if os.path.exists(marker):
            os.remove(marker)
            raise RuntimeError("init fails this once")
        with open(marker + ".seen", "a") as seen:
            seen.write(f"{os.getpid()} {time.monotonic()}\n")
    if order := os.environ.get("ZOO_INIT_LOG"):
        with open(order, "a") as log:
            log.write(f"begin {time.monotonic()}\n")
            log.flush()
            time.sleep(0.3)
            log.write(f"end {time.monotonic()}\n")


# --- good ones


@ogpu.service.expose()
def echo(data: Input) -> Output:
    """Answer what was said."""
    return Output(text=data.text, pid=os.getpid(), number=data.number)


@ogpu.service.expose()
async def echo_async(data: Input) -> Output:
    await asyncio.sleep(0.01)
    return Output(text=data.text, pid=os.getpid(), number=id(asyncio.get_running_loop()))


@ogpu.service.expose()
def facts(data: Input) -> Output:
    """Tell about the worker: ``text`` is an expression."""
    return Output(text=str(eval(data.text)), pid=os.getpid(), number=inits)


@ogpu.service.expose()
def looks_around(data: Input) -> Output:
    """Tell what this worker has inherited, as JSON."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}").partition(":")[0]
        except FileNotFoundError:  # the one that listed the folder
            continue
    found = {
        "descriptors": descriptors,
        "blocked_signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "leads_session": os.getsid(0) == os.getpid(),
        "sigterm_is_default": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "argv": sys.argv,
        "main": sys.modules["__main__"].__name__,
    }
    return Output(text=json.dumps(found))


@ogpu.service.expose(timeout=30)
def sleep(data: Input) -> Output:
    time.sleep(data.number)
    return Output(text=data.text, pid=os.getpid())


@ogpu.service.expose(timeout=1)
def sleep_for_a_second(data: Input) -> Output:
    """End at the deadline, unless ``number`` is below one."""
    time.sleep(data.number)
    return Output(text=data.text, pid=os.getpid())


@ogpu.service.expose()
def unlimited_sleep(data: Input) -> Output:
    time.sleep(data.number)
    return Output(text=data.text, pid=os.getpid())


@ogpu.service.expose()
def waits_for_file(data: Input) -> Output:
    while not os.path.exists(data.text):
        time.sleep(0.01)
    return Output(text=data.text)


@ogpu.service.expose()
def rich(data: Input) -> Output:
    return Output(when=datetime(2026, 1, 2, tzinfo=timezone.utc), number=float("nan"))


@ogpu.service.expose()
def big(data: Input) -> Output:
    return Output(text="x" * int(data.number))


# --- failing ones


@ogpu.service.expose()
def raises(data: Input) -> Output:
    print("about to fail")
    raise ValueError(data.text or "no luck")


@ogpu.service.expose()
def raises_strangely(data: Input) -> Output:
    class Strange(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even a text")

    raise Strange


@ogpu.service.expose()
def returns_none(data: Input) -> Output:
    return None  # type: ignore[return-value]


@ogpu.service.expose()
def returns_other(data: Input) -> Output:
    return Other(text="wrong model")  # type: ignore[return-value]


@ogpu.service.expose()
def returns_unwritable(data: Input) -> Output:
    return Output.model_construct(text=b"\xff\xfe", pid="no number")


@ogpu.service.expose()
def exits(data: Input) -> Output:
    sys.exit(7)


# --- dying ones


@ogpu.service.expose()
def exits_hard(data: Input) -> Output:
    os._exit(7)


@ogpu.service.expose()
def dies_of(data: Input) -> Output:
    os.kill(os.getpid(), int(data.number))
    time.sleep(60)
    return Output()


@ogpu.service.expose()
def kills_its_parent(data: Input) -> Output:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
    return Output()


@ogpu.service.expose()
def crashes_in_c(data: Input) -> Output:
    ctypes.string_at(0)
    return Output()


@ogpu.service.expose()
def closes_everything(data: Input) -> Output:
    os.closerange(0, 1024)
    time.sleep(60)
    return Output()


@ogpu.service.expose()
def writes_garbage(data: Input) -> Output:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 4096)
        except OSError:
            continue
    time.sleep(60)
    return Output()


# --- hanging ones; each past its timeout in a moment


@ogpu.service.expose(timeout=0.3)
def hangs_asleep(data: Input) -> Output:
    time.sleep(3600)
    return Output()


@ogpu.service.expose(timeout=0.3)
def hangs_in_python(data: Input) -> Output:
    while True:
        pass


@ogpu.service.expose(timeout=0.3)
def hangs_in_c(data: Input) -> Output:
    return Output(number=sum(range(10**14)))


@ogpu.service.expose(timeout=0.3)
def hangs_with_the_gil(data: Input) -> Output:
    ctypes.PyDLL(None).sleep(3600)
    return Output()


@ogpu.service.expose(timeout=0.3)
def hangs_in_a_regex(data: Input) -> Output:
    re.match(r"(a+)+$", "a" * 64 + "b")
    return Output()


@ogpu.service.expose(timeout=0.3)
def hangs_and_ignores_signals(data: Input) -> Output:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


@ogpu.service.expose(timeout=0.3)
def hangs_stopped(data: Input) -> Output:
    os.kill(os.getpid(), signal.SIGSTOP)
    return Output()


@ogpu.service.expose(timeout=0.3)
def hangs_in_threads(data: Input) -> Output:
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(3600,)).start()
    while True:
        time.sleep(1)


@ogpu.service.expose(timeout=0.3)
async def hangs_async(data: Input) -> Output:
    await asyncio.sleep(3600)
    return Output()


@ogpu.service.expose()
def family(data: Input) -> Output:
    return hangs_with_family(data)


@ogpu.service.expose(timeout=0.5)
def hangs_with_family(data: Input) -> Output:
    """Start children that try to get away, write down who they are, and hang."""
    child = "import os, sys, time; sys.stdout.write(f'{os.getpid()}\\n'); sys.stdout.flush(); "
    escape = "os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); "
    stay = "time.sleep(3600)"
    hard = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; "
    with open(data.text, "w") as pids:
        for code, options in (
            (child + stay, {}),
            (hard + child + stay, {"start_new_session": True}),
            ("import os; " + escape + child + stay, {}),
            ("import os; " + escape + child + stay, {"env": {"PATH": "/bin"}}),
        ):
            subprocess.Popen([sys.executable, "-c", code], stdout=pids, **options)
        time.sleep(3600)
    return Output()


# --- talkative ones


@ogpu.service.expose()
def speaks(data: Input) -> Output:
    print("from print")
    sys.stderr.write("from stderr\n")
    ogpu.service.logger.warning("from the logger")
    ctypes.CDLL(None).puts(b"from C")
    subprocess.run(["echo", "from a subprocess"], check=True)
    return Output()


@ogpu.service.expose()
def floods(data: Input) -> Output:
    line = b"y" * 99 + b"\n"
    for _ in range(int(data.number)):
        os.write(1, line * 100)
    return Output(text="done")


@ogpu.service.expose()
def speaks_binary(data: Input) -> Output:
    os.write(1, bytes(range(256)) * 4 + b"\n")
    return Output(text="done")


@ogpu.service.expose()
def uses_processes(data: Input) -> Output:
    import multiprocessing

    method = data.text or "fork"
    with multiprocessing.get_context(method).Pool(2) as pool:
        return Output(number=sum(pool.map(abs, [-1, -2, -3])))


@ogpu.service.expose()
def starts_again(data: Input) -> Output:
    ogpu.service.start()
    return Output(text="returned")


ogpu.service.start()
