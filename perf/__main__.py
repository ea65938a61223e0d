"""``python -m lossfuse.perf demo | bench``."""

import argparse
import importlib.util
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lossfuse.perf", description="See what lossfuse does, on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small transformer on real text with torch's loss and with ours")
    demo.add_argument("--out", type=Path, default=Path("lossfuse-demo.png"), help="the picture to write (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=40, help="training steps of each model (default: %(default)s)")
    bench = commands.add_parser("bench", help="time, memory and error of the loss on logits, beside torch's")
    bench.add_argument(
        "--shapes", type=shape, nargs="+", default=[(1024, 32000)], metavar="NxV", help="rows x classes (default: 1024x32000)"
    )
    bench.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp32", "bf16"], help="(default: fp32 bf16)")
    bench.add_argument("--repeats", type=int, default=9, help="timed calls of each variant (default: %(default)s)")
    bench.add_argument("--out", type=Path, help="CSV to append the rows to")
    options = parser.parse_args(arguments)
    missing = [name for name in ("altair", "pandas", "rich", "tokenizers", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"{', '.join(missing)} not installed: pip install 'lossfuse[perf]'\n")

    if options.command == "demo":
        from .demo import Setup
        from .demo import main as run_demo

        run_demo(options.out, Setup(steps=options.steps))
    else:
        from .bench import main as run_bench

        run_bench(options.shapes, options.dtypes, options.repeats, options.out)
    return 0


def shape(text: str) -> tuple[int, int]:
    """'1024x32000' -> (1024, 32000)."""
    n, v = (int(part) for part in text.lower().split("x"))
    return n, v


if __name__ == "__main__":
    sys.exit(main())
