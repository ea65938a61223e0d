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

# of the extra, by command: what keeps rows and prints them, and what draws
ROWS = ("filelock", "pandas", "rich")
PICTURES = (*ROWS, "altair", "vl_convert")
# a day: what waits for a program refuses more than some weeks
MOST_MINUTES = 24.0 * 60
NEEDED = {"demo": (*PICTURES, "tokenizers"), "memory": PICTURES, "dashboard": PICTURES}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a goal was missed, an error is beyond its bound, a test failed or what the command
    needs is not installed.

    2 with a sentence for what cannot be done; 3 where ``gpu`` has a GPU and could not settle
    everything on it; 130 after an interrupt."""
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
            # it may quote a file of somebody else's
            print(f"lossfuse.perf {options.command}: {clean(mistake)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"lossfuse.perf {options.command}: interrupted", file=sys.stderr)
            return 130


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, at least this."""

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
    """The type of an option that is a finite number within bounds."""
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
        prog="python -m lossfuse.perf", description="See what lossfuse does, on this machine."
    )
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="train a small transformer on real text with torch's loss and with ours"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("lossfuse-demo.png"),
        help="the picture to write (default: %(default)s)",
    )
    demo.add_argument(
        "--steps",
        type=whole(1),
        default=30,
        help="training steps of each model (default: %(default)s)",
    )

    bench = commands.add_parser(
        "bench", help="time, memory and error of every method on named cases or your own shapes"
    )
    bench.add_argument(
        "--cases",
        nargs="+",
        default=["llama2"],
        metavar="CASE",
        help=f"all, NxV, NxDxV (a head), NxVpP (labels), {', '.join(CASES)}",
    )
    bench.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="(default: fp32 bf16)"
    )
    bench.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["no_grad", "forward+backward"],
        help="(default: %(default)s)",
    )
    bench.add_argument(
        "--methods",
        metavar="TEXT",
        help="only methods whose name contains this, and torch's own (default: all)",
    )
    bench.add_argument(
        "--repeats",
        type=whole(1),
        default=15,
        help="timed calls of each method, at most (default: %(default)s)",
    )
    bench.add_argument(
        "--seconds",
        type=real(least=0),
        default=20.0,
        help="for a mode of a case; three calls of each are made anyway",
    )
    bench.add_argument("--out", type=Path, help="CSV to append the rows to")
    bench.add_argument(
        "--tests",
        choices=["run", "passed", "failed", "not run"],
        default="not run",
        help="what the rows say of this commit's tests",
    )

    bounds = commands.add_parser(
        "bounds",
        help="errors of losses and gradients against float64, in units of what arithmetic allows",
    )
    bounds.add_argument("--out", type=Path, help="CSV to append the rows to")

    compare = commands.add_parser("compare", help="two commits, or two files of rows, side by side")
    compare.add_argument("a", metavar="FILE[@COMMIT]")
    compare.add_argument("b", metavar="FILE[@COMMIT]")

    memory = commands.add_parser(
        "memory", help="the peak of a training step of yours, when it comes and who is alive then"
    )
    memory.add_argument(
        "step",
        metavar="MODULE:FUNCTION",
        help="something callable without arguments, e.g. train:step",
    )
    memory.add_argument(
        "--out",
        type=Path,
        help="picture (.png, .svg), page (.html) or table (.csv) of the timeline",
    )
    memory.add_argument(
        "--warmup",
        type=whole(0),
        default=1,
        help="calls before the one that is watched (default: %(default)s)",
    )

    estimate = commands.add_parser(
        "estimate", help="the bytes each method needs on a shape, without running it"
    )
    estimate.add_argument(
        "cases",
        nargs="+",
        metavar="CASE",
        help="NxV, NxDxV (a head), NxVpP (labels), or a named case",
    )
    estimate.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="(default: bf16)"
    )
    estimate.add_argument(
        "--mode", choices=MODES, default="forward+backward", help="(default: %(default)s)"
    )
    estimate.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)"
    )
    estimate.add_argument(
        "--fits",
        type=real(above=0),
        metavar="GIB",
        help="memory there is, for a verdict on each method",
    )
    of_ranks = estimate.add_argument_group(
        "over many ranks", "bytes of each rank, bytes on the wire and collectives of a step"
    )
    of_ranks.add_argument(
        "--layout",
        nargs="+",
        metavar="TP,SP,FSDP,DP",
        help="such as tp=8,sp=2,fsdp=64,dp=4; what is not named is 1, and one alone is itemised",
    )
    of_ranks.add_argument(
        "--reduction", choices=REDUCTIONS, default="mean", help="(default: %(default)s)"
    )
    for name, what in (
        ("probabilities", "targets are probabilities"),
        ("class-weights", "with class weights"),
        ("smoothing", "with smoothed labels"),
        ("statistics", "and the statistics of rows"),
        ("reshard", "FSDP gives the weight back after the forward and gathers it again"),
    ):
        of_ranks.add_argument(f"--{name}", action="store_true", help=what)
    of_ranks.add_argument(
        "--hidden-grad",
        choices=["reduced", "partial"],
        default="reduced",
        help="(default: %(default)s)",
    )
    of_ranks.add_argument("--chunk-bytes", type=whole(1), metavar="BYTES", help="of LinearOptions")
    of_ranks.add_argument(
        "--link-gbps",
        metavar="GBIT",
        help="what a rank sends a second, e.g. 400 or tp=3600,fsdp=400; then times are shown",
    )
    of_ranks.add_argument(
        "--latency-us",
        type=real(least=0),
        default=5.0,
        help="of each step of a ring (default: %(default)s, a guess)",
    )

    dashboard = commands.add_parser("dashboard", help="one page of rows that opens offline")
    dashboard.add_argument("rows", type=Path, nargs="+", metavar="CSV")
    dashboard.add_argument(
        "--out", type=Path, default=Path("lossfuse-dashboard.html"), help="(default: %(default)s)"
    )
    dashboard.add_argument(
        "--pngs", type=Path, metavar="FOLDER", help="also write the charts as pictures"
    )

    gpu = commands.add_parser(
        "gpu", help="tests, goals and peers on a GPU in one call; without one a small rehearsal"
    )
    gpu.add_argument(
        "--out",
        type=Path,
        default=Path("lossfuse-gpu"),
        metavar="FOLDER",
        help="rows, log, summary (default: %(default)s)",
    )
    gpu.add_argument(
        "--minutes",
        type=real(above=0, most=MOST_MINUTES),
        default=7.5,
        help="it ends inside them (default: %(default)s)",
    )
    return top


def run(options: argparse.Namespace) -> int:
    """The command; what it needs is imported here and not before."""
    if options.command == "demo":
        from . import demo

        demo.main(options.out, demo.Setup(steps=options.steps))
    elif options.command == "bench":
        from . import bench

        cases = list(CASES) if options.cases == ["all"] else options.cases
        effort = bench.Effort(options.repeats, options.seconds)
        bench.main(
            cases,
            options.dtypes,
            options.modes,
            options.methods,
            effort,
            options.out,
            options.tests,
        )
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
    names = (
        "mode",
        "reduction",
        "probabilities",
        "class_weights",
        "smoothing",
        "statistics",
        "hidden_grad",
        "reshard",
    )
    losses = {name: getattr(options, name) for name in names} | {
        "options": LinearOptions(chunk_bytes=options.chunk_bytes)
    }
    links = (
        None
        if options.link_gbps is None
        else layout_tables.Links.parse(options.link_gbps, options.latency_us)
    )
    layout_tables.main(options.cases, losses, options.dtypes, options.layout, options.fits, links)


if __name__ == "__main__":
    interrupts.leave(main())
