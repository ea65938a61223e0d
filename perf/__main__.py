"""``python -m lossfuse.perf demo``."""

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
    options = parser.parse_args(arguments)
    missing = [name for name in ("altair", "pandas", "rich", "tokenizers", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"{', '.join(missing)} not installed: pip install 'lossfuse[perf]'\n")

    from .demo import Setup
    from .demo import main as run_demo

    run_demo(options.out, Setup(steps=options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
