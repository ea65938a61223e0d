"""Blocks of rows in threads that each run their operators single-threaded.

torch's own threads synchronize at the end of every operator. If another process (a data loader)
takes a core, every operator of every block waits for that core: up to six times the time of torch's
loss, which has few long operators, on two cores. These threads synchronize once."""

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
    """Number of threads an operator would use; 1 under a dispatch mode or the profiler, which see
    the operators of their own thread only."""
    watched = _get_current_dispatch_mode() is not None or torch._C._autograd._profiler_enabled()
    return 1 if watched else torch.get_num_threads()


def run(tasks: Sequence[Callable[[], T]], count: int) -> list[T]:
    """The results of all tasks, computed by ``count`` threads, or by the caller if no thread can be
    started.

    An exception is raised after every thread has stopped.
    """
    inference = torch.is_inference_mode_enabled()
    todo = iter(enumerate(tasks))
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()
    busy, stopping = 0, False

    def work() -> None:
        nonlocal busy, stopping
        # these modes are thread-local
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with changed:
                    i, task = (-1, None) if stopping else next(todo, (-1, None))
                    if task is None:
                        stopping = True
                        changed.notify_all()
                        return
                    busy += 1
                try:
                    results[i] = task()
                except BaseException as error:
                    errors.append(error)
                    stopping = True
                finally:
                    with changed:
                        busy -= 1
                        changed.notify_all()

    def wait() -> None:
        with changed:
            changed.wait_for(lambda: stopping and busy == 0)

    asked = 0
    try:
        try:
            pool = _get_pool(count)
            for _ in range(min(count, len(tasks))):
                pool.submit(work)
                asked += 1
        except RuntimeError:
            # no thread can be started: the interpreter shuts down, or a limit is reached
            if asked == 0:
                return [task() for task in tasks]
        wait()
    except BaseException:
        # an interrupt: wait until no thread writes into the caller's memory, also through further
        # interrupts
        stopping = True
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


def _get_pool(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _making:
        if _pool is None or _size < count:
            num_threads = torch.get_num_threads()
            started = threading.Barrier(count + 1)
            pool = ThreadPoolExecutor(count, thread_name_prefix="lossfuse")
            try:
                for _ in range(count):
                    pool.submit(_use_one_thread, started)
                started.wait()
            except BaseException:
                # threads that have started would wait for the others forever
                started.abort()
                pool.shutdown()
                raise
            finally:
                # the setting is thread-local, but a thread that never set it inherits the last one
                # of any thread
                torch.set_num_threads(num_threads)
            _pool, _size = pool, count
        return _pool


def _use_one_thread(started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    started.wait()


def _forget() -> None:
    global _pool, _making
    _pool, _making = None, threading.Lock()


# a forked process has the pool, but not its threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
