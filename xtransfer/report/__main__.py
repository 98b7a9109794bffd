"""Print and draw the results of workdirs.

    python -m xtransfer.report --workdir DIR [DIR …]

Prints objectives × languages for each workdir, and writes `report/results.md` and `report/results.png` below it, with
the metric, the split, and the number of seeds.
"""

import argparse
from pathlib import Path

from xtransfer.evaluation.metrics import METRICS
from xtransfer.report.workdir_report import report
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal


def main(argv: list[str]) -> None:
    """Parse the flags, and report on every workdir."""
    parser = argparse.ArgumentParser(prog="python -m xtransfer.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, nargs="+", required=True, metavar="DIR", help="workdirs to report on")
    parser.add_argument("--metric", choices=METRICS, default="accuracy", help="default: %(default)s")
    parser.add_argument("--split", help="default: test, if it was evaluated")
    parser.add_argument(
        "--selection", choices=PROTOCOLS, default="source_dev", help="the selection protocol (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for root in args.workdir:
        report(Workdir(root), metric=args.metric, split=args.split, selection=args.selection)


if __name__ == "__main__":
    terminal.run(main)
