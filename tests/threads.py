"""Threads that share an object, and are made to interleave."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn


SECONDS = 20


def together(jobs: list[Callable[[Callable[[], None]], Any]]) -> list[Any]:
    """What jobs return that run in a thread each, and at each call of their argument wait for all that still run."""
    barrier, done = threading.Barrier(len(jobs)), threading.Event()

    def run(job: Callable[[Callable[[], None]], Any]) -> Any:
        def meet() -> None:
            if not done.is_set():
                with suppress(threading.BrokenBarrierError):  # a job has ended: the others go on as they come
                    barrier.wait(SECONDS)

        try:
            return job(meet)
        finally:
            done.set()
            barrier.abort()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, job) for job in jobs]]


@contextmanager
def at_first_call(module: nn.Module, act: Callable[[], None]) -> Iterator[None]:
    """Has another thread act when the module is called for the first time, and waits for it."""

    def hook(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=act)
        thread.start()
        thread.join(SECONDS)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
