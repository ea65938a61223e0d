"""Ctrl-C ends a command, even inside libraries that ignore or catch the interrupt."""

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
    """Raise KeyboardInterrupt on an interrupt, as usual, and remember it for :func:`check`."""

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
    """Raise KeyboardInterrupt if one was dropped in a destructor, a C++ callback or an import."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def result_of(call: Callable[[], T]) -> T:
    """Run a long call that ignores interrupts in a thread, while this thread waits for them."""
    results: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
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
    return results[0]


def leave(code: int) -> None:
    """Exit without waiting for an interrupted call, and without a second traceback."""
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if any(thread.is_alive() for thread in _working):
        # the thread would return to a finalized interpreter
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
