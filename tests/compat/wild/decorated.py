"""Handlers that are not plain functions: decorated ones, methods, factories."""
import functools
import threading
import time

import ogpu.service
from ogpu.service.decorators import expose, init
from ogpu.service.handler import add_handler
from ogpu.service.logger import logger
from pydantic import BaseModel


class In(BaseModel):
    text: str = ""


class Out(BaseModel):
    text: str
    by: str = ""


def timed(func):
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        started = time.perf_counter()
        try:
            return func(*args, **kwargs)
        finally:
            logger.debug(f"{func.__name__} took {time.perf_counter() - started:.3f} s")
            logger.info(f"{func.__name__} timed")

    return wrapper


def retry(times):
    def decorator(func):
        @functools.wraps(func)
        def wrapper(data):
            for attempt in range(1, times + 1):
                try:
                    return func(data)
                except ConnectionError as e:
                    logger.warning(f"attempt {attempt}: {e}")
            return None

        return wrapper

    return decorator


_local = threading.local()


@expose(timeout=30)
@timed
@retry(3)
def flaky(data: In) -> Out:
    _local.calls = getattr(_local, "calls", 0) + 1
    if data.text == "never" or _local.calls % 3:
        raise ConnectionError("try again")
    return Out(text=data.text, by="flaky")


class Summarizer:
    def __init__(self, name):
        self.name = name
        self.model = None

    def load(self):
        self.model = str.upper

    def summarize(self, data: In) -> Out:
        return Out(text=self.model(data.text), by=self.name)

    @staticmethod
    @expose()
    def echo(data: In) -> Out:
        return Out(text=data.text, by="static")


service = Summarizer("one")
init()(service.load)
expose(timeout=5)(service.summarize)


def make(word):
    def handler(data: In) -> Out:
        return Out(text=f"{word} {data.text}", by=handler.__name__)

    handler.__name__ = f"say_{word}"
    return handler


for word in ("hello", "bye"):
    expose()(make(word))

add_handler(lambda data: Out(text="λ"), In, Out)


if __name__ == "__main__":
    logger.task_success("all %s", "registered")
    assert Summarizer.echo(In(text="direct")).text == "direct"
    ogpu.service.start()
