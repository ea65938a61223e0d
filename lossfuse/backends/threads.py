"""Blocks of rows in threads that each run their operators single-threaded.

torch's own threads synchronize at the end of every operator. If another process (a data loader)
takes a core, every operator of every block waits for that core: up to six times the time of torch's
loss, which has few long operators, on two cores. These threads synchronize once."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

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
    queue = _Queue(tasks)
    submitted = 0
    try:
        try:
            pool = _get_pool(count)
            for _ in range(min(count, len(tasks))):
                pool.submit(queue.work)
                submitted += 1
        except RuntimeError:
            # no thread can be started: the interpreter shuts down, or a limit is reached
            if submitted == 0:
                return [task() for task in tasks]
        queue.wait()
    except BaseException:
        # an interrupt: wait until no thread writes into the caller's memory, also through further
        # interrupts
        queue.stopping = True
        while True:
            try:
                queue.wait()
                break
            except KeyboardInterrupt:
                pass
        raise
    if queue.errors:
        raise queue.errors[0]
    return [queue.results[i] for i in range(len(tasks))]


class _Queue(Generic[T]):
    """Tasks that threads take one by one, until none is left or one has failed."""

    def __init__(self, tasks: Sequence[Callable[[], T]]) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._todo = iter(enumerate(tasks))
        self._changed = threading.Condition()
        self._busy = 0
        self.stopping = False
        self.results: dict[int, T] = {}
        self.errors: list[BaseException] = []

    def work(self) -> None:
        # these modes are thread-local
        with torch.inference_mode(self._inference), torch.no_grad():
            while True:
                with self._changed:
                    i, task = (-1, None) if self.stopping else next(self._todo, (-1, None))
                    if task is None:
                        self.stopping = True
                        self._changed.notify_all()
                        return
                    self._busy += 1
                try:
                    self.results[i] = task()
                except BaseException as error:
                    self.errors.append(error)
                    self.stopping = True
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()

    def wait(self) -> None:
        """Block until no thread works on a task and none will start one."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping and self._busy == 0)


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


def _forget_pool() -> None:
    global _pool, _making
    _pool, _making = None, threading.Lock()


# a forked process has the pool, but not its threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
