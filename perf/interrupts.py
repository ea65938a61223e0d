"""Ctrl-C ends a command, also while a library does not look for it, and where one catches it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_interrupted = threading.Event()
_working: list[threading.Thread] = []


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """An interrupt raises KeyboardInterrupt, as always, and is remembered for :func:`check`."""

    def interrupt(number: int, frame: Any) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


def check() -> None:
    """Raise KeyboardInterrupt if one was lost: in a destructor, a callback from C++ or an import
    that catches everything."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def result_of(call: Callable[[], T]) -> T:
    """Run a long call that ignores interrupts in a thread of its own, while this thread listens for
    them."""
    made: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            made.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    _working.append(thread)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    _working.remove(thread)
    if raised:
        raise raised[0]
    return made[0]


def leave(code: int) -> None:
    """Exit, without waiting for a call that was interrupted, and without the traceback of a second
    interrupt."""
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if any(thread.is_alive() for thread in _working):
        # such a thread would come back to an interpreter that is gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
