"""Functions run on several processes at once, ranks of gloo groups on the CPU.

A process takes seconds to start, most of them for importing torch, so a test hands over all its
cases at once::

    def a_case(name):                      # of a module, not a closure; runs on every rank
        assert dist.get_world_size() == 2
        return LAYOUTS[name]()             # what pickle takes

    def test_layouts():
        results = cases_on_ranks(2, a_case, list(LAYOUTS))       # {name: [of rank 0, of rank 1]}

A case that raises on any rank fails alone: the next has new groups. What failed, with the
tracebacks of its ranks, is one AssertionError at the end. A rank that waits for another longer than
``patience`` fails too. ``on_ranks`` runs one function once and raises what it raised."""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# seconds, ten times what a quiet machine with two cores needs: of a rank for the others, and of all
# cases of a call
PATIENCE = 150.0
TIMEOUT = 1200.0


def on_ranks(
    n: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """``function(*args)`` on each of ``n`` ranks: their results, or the first exception that one of
    them raised."""
    (outcomes,) = _run(n, function, [args], timeout)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise min(failed, key=lambda outcome: outcome.when).error  # type: ignore[misc]
    return [outcome.result for outcome in outcomes]


def cases_on_ranks(
    n: int, function: Callable[[Any], Any], cases: Iterable[Any], *, timeout: float = TIMEOUT
) -> dict[Any, list[Any]]:
    """``function(case)`` for one case after the other on each of ``n`` ranks, started once; {case:
    results by rank}."""
    cases = list(cases)
    results, said = {}, []
    for case, outcomes in zip(
        cases, _run(n, function, [(case,) for case in cases], timeout), strict=True
    ):
        failed = [(rank, o) for rank, o in enumerate(outcomes) if o.error is not None]
        said += [
            f"--- {case}, rank {rank} of {n}\n{o.trace}"
            for rank, o in sorted(failed, key=lambda at: at[1].when)
        ]
        results[case] = [outcome.result for outcome in outcomes]
    if said:
        raise AssertionError("\n".join(["cases failed on their ranks", *said]))
    return results


class Outcome:
    """The result of a function on a rank, or its error."""

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self.result, self.error, self.when = result, error, time.time()
        self.trace = "" if error is None else "".join(traceback.format_exception(error))

    def __reduce__(self) -> Any:
        error = self.error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(self.trace)
        return _outcome, (self.result, error, self.when, self.trace)


def _outcome(result: Any, error: BaseException | None, when: float, trace: str) -> Outcome:
    made = Outcome(result, error)
    made.when, made.trace = when, trace
    if error is not None:
        error.__cause__ = RuntimeError(f"on its rank:\n{trace}")
    return made


def _run(
    n: int, function: Callable[..., Any], calls: list[tuple[Any, ...]], timeout: float
) -> list[list[Outcome]]:
    """By call, by rank."""
    spawn = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout
    got: list[list[Outcome]] = [[] for _ in range(n)]
    source = sys.modules[function.__module__].__file__, function.__module__, function.__qualname__
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe(duplex=False) for _ in range(n)]
        ranks = [
            spawn.Process(
                target=_rank,
                args=(rank, n, f"{folder}/store", source, calls, timeout, send),
                daemon=True,
            )
            for rank, (_, send) in enumerate(pipes)
        ]
        try:
            for process in ranks:
                process.start()
            for _, send in pipes:
                # theirs alone, so that the end of a rank is the end of its pipe
                send.close()
            heard: dict[Any, int] = {receive: rank for rank, (receive, _) in enumerate(pipes)}
            while heard:
                ready = wait(list(heard), max(0.0, deadline - time.monotonic()))
                if not ready:
                    at = ", ".join(
                        f"rank {r} in call {len(got[r])}: {calls[len(got[r])]}"
                        for r in sorted(heard.values())
                    )
                    raise AssertionError(
                        f"no word in {timeout} s from {at}; their stacks are on stderr"
                    )
                for receive in ready:
                    rank = heard[receive]
                    try:
                        got[rank].append(pickle.loads(receive.recv_bytes()))  # type: ignore[union-attr]
                    except EOFError:
                        del heard[receive]
                        ranks[rank].join(5)
                        if len(got[rank]) < len(calls):
                            code = ranks[rank].exitcode
                            raise AssertionError(
                                f"rank {rank} of {n} ended with {code} in {calls[len(got[rank])]}"
                            ) from None
                    if len(got[rank]) == len(calls):
                        heard.pop(receive, None)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.join(1)
                    process.kill()
            for receive, _ in pipes:
                receive.close()
    return [list(of_call) for of_call in zip(*got, strict=True)]


def _rank(
    rank: int,
    n: int,
    store: str,
    source: tuple[str, str, str],
    calls: list[tuple[Any, ...]],
    timeout: float,
    send: Connection,
) -> None:
    faulthandler.dump_traceback_later(timeout - 3.0, exit=True)
    # a host's name need not resolve
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # ranks are on the CPU also beside a GPU; read when a kernel module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    function = _found(*source)
    for at, args in enumerate(calls):
        if not dist.is_initialized():
            patience = timedelta(seconds=PATIENCE)
            dist.init_process_group(
                "gloo", init_method=f"file://{store}{at}", rank=rank, world_size=n, timeout=patience
            )
        torch.manual_seed(0)
        try:
            outcome = Outcome(function(*args))
            # with a rank that fails all do, so that all make new groups
            dist.barrier()
        except BaseException as error:
            outcome = Outcome(error=error)
            dist.destroy_process_group()
        try:
            said = pickle.dumps(outcome)
        except Exception as error:
            said = pickle.dumps(Outcome(error=error))
        send.send_bytes(said)
    if dist.is_initialized():
        dist.destroy_process_group()
    send.close()


def _found(path: str, module: str, name: str) -> Callable[..., Any]:
    """By its file: pytest imports tests under names that another process need not know."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found
