"""Print and draw the results of workdirs.

    python -m xtransfer.report --workdir DIR [DIR …]

Prints objectives × languages for each workdir, and writes `report/results.md`, `report/results.png`, and the page
`report/report.html` below it. With `--output DIR`, one more page, `DIR/report.html`, holds all workdirs. Results of
another metric, split, or selection get files of their own, such as `report/results-target_dev.md`.

    python -m xtransfer.report --workdir DIR --metric teacher_agreement

Prints how often students predict what their teacher predicts, and writes `report/teacher_agreement.md`.

For the directory of a sweep, it draws the average of the target languages against the swept key instead, and writes
`report/sweep.md`, `sweep.png`, and `sweep.jsonl`.

    python -m xtransfer.report --workdir DIR --compare A B
    python -m xtransfer.report --compare DIR1:A DIR2:B

Compares the accuracy of two objectives, paired by seed and test item, and writes `report/compare-A-B.md` and `.jsonl`.

    python -m xtransfer.report --workdir DIR --protocols

Puts the selection protocols side by side, a row for each objective and protocol, and writes `report/protocols.md`.
"""

from xtransfer.errors import ConfigError
from xtransfer.evaluation.metrics import TEACHER_METRICS, metric_of
from xtransfer.report.agreement import report_agreement
from xtransfer.report.comparison import check_comparable, compare, students_of
from xtransfer.report.protocols import compare_protocols
from xtransfer.report.sweep_report import report_sweep
from xtransfer.report.workdir_report import default_split, name_of, report, write_page
from xtransfer.runs import sweep
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.runtime import terminal


def main(argv: list[str]) -> None:
    """Parse the flags, and report on every workdir."""
    parser = terminal.parser("report", __doc__)
    parser.add_argument(
        "--workdir",
        type=terminal.path_argument,
        nargs="+",
        default=[],
        metavar="DIR",
        help="workdirs to report on",
    )
    parser.add_argument(
        "--output",
        type=terminal.path_argument,
        metavar="DIR",
        help="also write one page about all workdirs, DIR/report.html",
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two objectives of the workdir, or of others as DIR:OBJECTIVE"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="in percent (default: accuracy, or micro_f1 in a multi-label task)"
    )
    parser.add_argument("--split", help="default: test, if it was evaluated")
    parser.add_argument(
        "--selection",
        choices=PROTOCOLS,
        help="the selection protocol (default: source_dev, or last without a dev split)",
    )
    parser.add_argument("--protocols", action="store_true", help="compare the selection protocols")
    args = parser.parse_args(argv)
    if args.metric is not None and not metric_of(args.metric).is_share:
        raise ConfigError(f"--metric {args.metric}: the report is in percent; read this metric in results.jsonl")
    if args.metric in TEACHER_METRICS and (args.protocols or args.output is not None):
        raise ConfigError(f"--metric {args.metric}: it has a table of its own: leave out --protocols and --output")
    if args.protocols and (args.compare or args.output is not None or args.selection is not None):
        raise ConfigError("--protocols compares all protocols: leave out --compare, --output, and --selection")
    args.workdir = list(dict.fromkeys(args.workdir))
    if args.compare:
        if args.metric is not None:
            check_comparable(args.metric, *(students_of(name, args.workdir) for name in args.compare))
        if args.output is not None:
            raise ConfigError("--output: a comparison is written to the workdir of A; leave out one of the two flags")
        a, b = (students_of(name, args.workdir) for name in args.compare)
        compare(a, b, split=args.split, selection=args.selection)
        return
    if not args.workdir:
        raise ConfigError("name the workdirs to report on: --workdir DIR …")
    if args.protocols:
        for root in args.workdir:
            split = args.split or default_split(read_config(Workdir(root)).evaluation_splits)
            compare_protocols(Workdir(root), metric=args.metric, split=split)
        return
    chosen = {"metric": args.metric, "split": args.split, "selection": args.selection}
    if args.metric in TEACHER_METRICS:
        for root in args.workdir:
            report_agreement(Workdir(root), **chosen)
        return
    roots = []
    for root in args.workdir:
        if sweep.is_sweep(root):
            points = report_sweep(root, **{**chosen, "selection": args.selection or "source_dev"})
            roots += [point.root for point in points] if args.output is not None else []
        else:
            roots.append(root)
    sources = [report(Workdir(root), **chosen) for root in roots]
    if args.output is not None:
        name = name_of("report", sources[0].results, sources[0].config, has_dev=sources[0].task.has_dev)
        for path in write_page(sources, args.output, name):
            terminal.log(f"written: {path}")


if __name__ == "__main__":
    terminal.run(main)
