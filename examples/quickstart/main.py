"""A whole source: two handlers and what they need. Start it with `python main.py`."""

import time

from pydantic import BaseModel, Field

import ogpu.service

primes: list[int] = []


class Number(BaseModel):
    value: int = Field(ge=2, lt=100_000_000, description="the number to take apart")


class Factors(BaseModel):
    factors: list[int] = Field(description="its prime factors, the smallest first")


class Nap(BaseModel):
    seconds: float = Field(0.1, ge=0, description="how long to sleep")
    hang: bool = Field(False, description="do not sleep, but hang for good")


class Rested(BaseModel):
    seconds: float = Field(description="how long it really was")


@ogpu.service.init()
def find_primes() -> None:
    """Runs once in each worker, before its first task; most sources load a model here."""
    for number in range(2, 10_000):
        if all(number % prime for prime in primes):
            primes.append(number)


@ogpu.service.expose(timeout=10)
def factorise(data: Number) -> Factors:
    """Take a number apart into its prime factors."""
    rest, factors = data.value, []
    for prime in primes:
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    return Factors(factors=[*factors, rest] if rest > 1 else factors)


@ogpu.service.expose(timeout=2)
def sleepy(data: Nap) -> Rested:
    """Sleep for a moment, or hang where no exception and no signal handler of Python's gets in."""
    started = time.perf_counter()
    if data.hang:
        sum(range(10**14))  # weeks inside C, holding the interpreter lock
    time.sleep(data.seconds)
    return Rested(seconds=time.perf_counter() - started)


if __name__ == "__main__":
    ogpu.service.start()
