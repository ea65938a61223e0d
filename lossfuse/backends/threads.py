"""Blocks of rows shared out among threads that each compute alone.

An operator's own threads meet at its end, and where one core is taken by somebody else (a data
loader, another process) every operator of every block waits for it: six times slower than torch,
which has few long operators, was seen on two cores. Threads that meet once do not."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_size = 0
_making = threading.Lock()


def workers() -> int:
    """As many as an operator would use here; 1 where whoever watches this thread's operators must
    see them all."""
    watched = _get_current_dispatch_mode() is not None or torch._C._autograd._profiler_enabled()
    return 1 if watched else torch.get_num_threads()


def run(tasks: Sequence[Callable[[], T]], count: int) -> list[T]:
    """The results of all tasks, by ``count`` threads, or by the caller where no thread is to be
    had.

    An exception is raised after every thread has stopped.
    """
    inference = torch.is_inference_mode_enabled()
    todo = iter(enumerate(tasks))
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()
    busy, over = 0, False

    def work() -> None:
        nonlocal busy, over
        # modes belong to threads
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with changed:
                    i, task = (-1, None) if over else next(todo, (-1, None))
                    if task is None:
                        over = True
                        changed.notify_all()
                        return
                    busy += 1
                try:
                    results[i] = task()
                except BaseException as error:
                    errors.append(error)
                    over = True
                finally:
                    with changed:
                        busy -= 1
                        changed.notify_all()

    def wait() -> None:
        with changed:
            changed.wait_for(lambda: over and busy == 0)

    asked = 0
    try:
        try:
            pool = _pool_of(count)
            for _ in range(min(count, len(tasks))):
                pool.submit(work)
                asked += 1
        except RuntimeError:
            # no more threads: the process ends, or has as many as it may have
            if asked == 0:
                return [task() for task in tasks]
        wait()
    except BaseException:
        # an interrupt: nobody may go on writing into the caller's memory, nor may another one let
        # them
        over = True
        while True:
            try:
                wait()
                break
            except KeyboardInterrupt:
                pass
        raise
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(tasks))]


def _pool_of(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _making:
        if _pool is None or _size < count:
            mine = torch.get_num_threads()
            together = threading.Barrier(count + 1)
            pool = ThreadPoolExecutor(count, thread_name_prefix="lossfuse")
            try:
                for _ in range(count):
                    pool.submit(_alone, together)
                together.wait()
            except BaseException:
                # those that are there would wait for the others until the process ends, which waits
                # for them
                together.abort()
                pool.shutdown()
                raise
            finally:
                # the number is of the thread, but a thread that never set one starts with what was
                # set last anywhere
                torch.set_num_threads(mine)
            _pool, _size = pool, count
        return _pool


def _alone(together: threading.Barrier) -> None:
    torch.set_num_threads(1)
    together.wait()


def _forget() -> None:
    global _pool, _making
    _pool, _making = None, threading.Lock()


# a forked process has the pool and none of its threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
