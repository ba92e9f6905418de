"""Handlers that never return, each in a way of its own, and one that does.

BENCHMARK_IMPORT=torch imports that at module level, as most deployed sources do: the process that
workers are forked from, and each worker, is then some hundred MB. With tensorflow they are spawned.
"""

import ctypes
import importlib
import os
import re
import signal
import time

from pydantic import BaseModel

import ogpu.service

if name := os.environ.get("BENCHMARK_IMPORT"):
    importlib.import_module(name)  # only its weight is wanted

TIMEOUT_S = float(os.environ["BENCHMARK_TIMEOUT_S"])


class Text(BaseModel):
    text: str


@ogpu.service.init()
def load() -> None:
    """Load nothing."""


@ogpu.service.expose()
def echo(data: Text) -> Text:
    return data


@ogpu.service.expose(timeout=TIMEOUT_S)
def sleep_loop(_: Text) -> Text:
    while True:
        time.sleep(0.01)


@ogpu.service.expose(timeout=TIMEOUT_S)
def busy_loop(_: Text) -> Text:
    while True:
        pass


@ogpu.service.expose(timeout=TIMEOUT_S)
def sum_in_c(_: Text) -> Text:
    """One call into C that holds the GIL: no signal handler written in Python runs meanwhile."""
    return Text(text=str(sum(range(10**14))))


@ogpu.service.expose(timeout=TIMEOUT_S)
def sleep_in_c(data: Text) -> Text:
    """Sleep in libc with the GIL held, which no other thread of the worker can take away."""
    ctypes.PyDLL(None).sleep(1_000_000)
    return data


@ogpu.service.expose(timeout=TIMEOUT_S)
def regex(_: Text) -> Text:
    """Backtrack through 2**64 ways; `re` holds the GIL throughout."""
    return Text(text=str(re.match(r"(a+)+$", "a" * 64 + "b")))


@ogpu.service.expose(timeout=TIMEOUT_S)
def ignore_sigterm(_: Text) -> Text:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(0.01)


@ogpu.service.expose(timeout=TIMEOUT_S)
def stopped(data: Text) -> Text:
    """Stop the whole process; only SIGKILL and SIGCONT reach it now."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return data


ogpu.service.start()
