"""``python -m lossfuse.perf demo | bench | bounds | compare | memory | estimate | dashboard |
gpu``."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

from ..spec import REDUCTIONS, LinearOptions
from . import interrupts
from .cases import CASES, DTYPES, MODES
from .mistakes import Mistake
from .shown import clean

# packages of the extra by command: for rows and tables, and for pictures
ROWS = ("filelock", "pandas", "rich")
PICTURES = (*ROWS, "altair", "vl_convert")
# a day; time limits of subprocess refuse more than some weeks
MOST_MINUTES = 24.0 * 60
NEEDED = {"demo": (*PICTURES, "tokenizers"), "memory": PICTURES, "dashboard": PICTURES}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: a goal was missed, an error is beyond its bound, a test failed or a package is
    missing. 2: the arguments are wrong. 3: ``gpu`` could not decide everything on a GPU. 130: an
    interrupt."""
    options = parser().parse_args(arguments)
    missing = [
        name for name in NEEDED.get(options.command, ROWS) if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(f"{', '.join(missing)} not installed: pip install 'lossfuse[perf]'", file=sys.stderr)
        return 1
    with interrupts.remembered():
        try:
            code = run(options)
            interrupts.check()
            return code
        except Mistake as mistake:
            # the message may quote a foreign file
            print(f"lossfuse.perf {options.command}: {clean(mistake)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"lossfuse.perf {options.command}: interrupted", file=sys.stderr)
            return 130


def whole(least: int) -> Callable[[str], int]:
    """The type of a whole-number option."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, at least {least}")
        return value

    return number


def real(
    above: float = -math.inf, least: float = -math.inf, most: float = sys.float_info.max
) -> Callable[[str], float]:
    """The type of an option that is a finite number."""
    bounds = [f"above {above:g}" if above > -math.inf else f"at least {least:g}"]
    bounds += [f"at most {most:g}"] if most < sys.float_info.max else []

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text!r}, expected a number, {' and '.join(bounds)}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m lossfuse.perf", description="Measure lossfuse on this machine."
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, about, add_options in (
        ("demo", "train a small transformer on real text with torch's loss and ours", _demo),
        ("bench", "time, memory and error of every method on named or your own shapes", _bench),
        ("bounds", "errors of losses and gradients against float64, in units of a bound", _bounds),
        ("compare", "two commits, or two files of rows, side by side", _compare),
        ("memory", "peak memory of your training step, its time and its tensors", _memory),
        ("estimate", "bytes that each method needs on a shape, by formula", _estimate),
        ("dashboard", "one page of rows that opens offline", _dashboard),
        ("gpu", "tests, goals and peers on a GPU; without one a small rehearsal", _gpu),
    ):
        add_options(commands.add_parser(name, help=about))
    return top


DEFAULT = "(default: %(default)s)"


def _demo(command: argparse.ArgumentParser) -> None:
    add, picture = command.add_argument, Path("lossfuse-demo.png")
    add("--out", type=Path, default=picture, help=f"picture to write {DEFAULT}")
    add("--steps", type=whole(1), default=30, help=f"training steps of each model {DEFAULT}")


def _bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    names = f"all, NxV, NxDxV (a head), NxVpP (labels), {', '.join(CASES)}"
    add("--cases", nargs="+", default=["llama2"], metavar="CASE", help=names)
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help=DEFAULT)
    add("--modes", nargs="+", choices=MODES, default=["no_grad", "forward+backward"], help=DEFAULT)
    only = "only methods with this in their name, and torch's own (default: all)"
    add("--methods", metavar="TEXT", help=only)
    add("--repeats", type=whole(1), default=15, help=f"timed calls of a method at most {DEFAULT}")
    limit = f"time limit of a mode of a case, after three calls of each method {DEFAULT}"
    add("--seconds", type=real(least=0), default=20.0, help=limit)
    add("--out", type=Path, help="CSV to append the rows to")
    states = ["run", "passed", "failed", "not run"]
    add("--tests", choices=states, default="not run", help="state of this commit's tests")


def _bounds(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, help="CSV to append the rows to")


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="FILE[@COMMIT]")
    command.add_argument("b", metavar="FILE[@COMMIT]")


def _memory(command: argparse.ArgumentParser) -> None:
    add, out = command.add_argument, "picture (.png, .svg), page (.html) or table (.csv) to write"
    step = "a function without arguments, e.g. train:step"
    add("step", metavar="MODULE:FUNCTION", help=step)
    add("--out", type=Path, help=out)
    add("--warmup", type=whole(0), default=1, help=f"calls before the recorded one {DEFAULT}")


def _estimate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    names = "NxV, NxDxV (a head), NxVpP (labels), or a named case"
    add("cases", nargs="+", metavar="CASE", help=names)
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help=DEFAULT)
    add("--mode", choices=MODES, default="forward+backward", help=DEFAULT)
    add("--device", choices=["cuda", "cpu"], default="cuda", help=DEFAULT)
    add("--fits", type=real(above=0), metavar="GIB", help="available memory, to judge each method")

    about = "bytes of each rank, bytes sent and collectives of a step"
    add = command.add_argument_group("over many ranks", about).add_argument
    layout = "such as tp=8,sp=2,fsdp=64,dp=4 (an absent degree is 1); a single one is itemized"
    add("--layout", nargs="+", metavar="TP,SP,FSDP,DP", help=layout)
    add("--reduction", choices=REDUCTIONS, default="mean", help=DEFAULT)
    for name, about in (
        ("probabilities", "targets are probabilities"),
        ("class-weights", "with class weights"),
        ("smoothing", "with label smoothing"),
        ("statistics", "with the statistics of rows"),
        ("reshard", "FSDP frees the weight after the forward and gathers it again"),
    ):
        add(f"--{name}", action="store_true", help=about)
    add("--hidden-grad", choices=["reduced", "partial"], default="reduced", help=DEFAULT)
    add("--chunk-bytes", type=whole(1), metavar="BYTES", help="of LinearOptions")
    rate = "bandwidth of a rank, e.g. 400 or tp=3600,fsdp=400, to show times"
    add("--link-gbps", metavar="GBIT", help=rate)
    latency = f"of each step of a ring {DEFAULT[:-1]}, a guess)"
    add("--latency-us", type=real(least=0), default=5.0, help=latency)


def _dashboard(command: argparse.ArgumentParser) -> None:
    add, page = command.add_argument, Path("lossfuse-dashboard.html")
    add("rows", type=Path, nargs="+", metavar="CSV")
    add("--out", type=Path, default=page, help=DEFAULT)
    add("--pngs", type=Path, metavar="FOLDER", help="also write the charts as pictures")


def _gpu(command: argparse.ArgumentParser) -> None:
    add, folder = command.add_argument, Path("lossfuse-gpu")
    rows = f"rows, log, summary {DEFAULT}"
    add("--out", type=Path, default=folder, metavar="FOLDER", help=rows)
    minutes = real(above=0, most=MOST_MINUTES)
    add("--minutes", type=minutes, default=7.5, help=f"time limit {DEFAULT}")


def run(options: argparse.Namespace) -> int:
    """Import the module of a command and run it."""
    if options.command == "demo":
        from . import demo

        demo.main(options.out, demo.Setup(steps=options.steps))
    elif options.command == "bench":
        from . import bench

        cases = list(CASES) if options.cases == ["all"] else options.cases
        effort = bench.Effort(options.repeats, options.seconds)
        chosen = (cases, options.dtypes, options.modes, options.methods)
        bench.main(*chosen, effort, options.out, options.tests)
    elif options.command == "bounds":
        from . import bounds

        return bounds.main(options.out)
    elif options.command == "compare":
        from . import compare

        compare.main(options.a, options.b)
    elif options.command == "memory":
        from . import memory_view

        memory_view.main(options.step, options.out, options.warmup)
    elif options.command == "estimate":
        if options.layout:
            _layouts(options)
            return 0
        from . import estimate

        estimate.main(options.cases, options.dtypes, options.mode, options.device, options.fits)
    elif options.command == "dashboard":
        from . import dashboard

        dashboard.main(options.rows, options.out, options.pngs)
    else:
        from . import gpu

        return gpu.main(options.out, options.minutes)
    return 0


def _layouts(options: argparse.Namespace) -> None:
    from . import layout_tables

    if options.device == "cpu":
        raise Mistake("--layout is for accelerators, but --device is cpu")
    flags = ("probabilities", "class_weights", "smoothing", "statistics", "reshard")
    names = ("mode", "reduction", "hidden_grad", *flags)
    losses = {name: getattr(options, name) for name in names}
    losses["options"] = LinearOptions(chunk_bytes=options.chunk_bytes)
    links = None
    if options.link_gbps is not None:
        links = layout_tables.Links.parse(options.link_gbps, options.latency_us)
    given = (options.cases, losses, options.dtypes, options.layout, options.fits)
    layout_tables.main(*given, links)


if __name__ == "__main__":
    interrupts.leave(main())
