"""Run an experiment in several variants, repeat each on several samples, and compare them.

    python -m xtransfer.study --config configs/studies/claim.py --workdir runs/claim [--variants NAME …]

The config names a base experiment, the variants' changes to it, and the encoders to pretrain first. Every repetition
is an experiment with a directory of its own, `DIR/VARIANT/NUMBER`, and the same command resumes. The comparison is
printed, and written to `DIR/study.md` and `DIR/study.jsonl`.
"""

from xtransfer.errors import ConfigError, nearest
from xtransfer.runtime import terminal
from xtransfer.study.design import load
from xtransfer.study.runner import run
from xtransfer.train.checkpoints import FALL_BACK_FLAG, FALL_BACK_HELP


def main(argv: list[str]) -> None:
    """Parse the flags, run the missing repetitions, and compare the variants."""
    parser = terminal.parser("study", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the study; see configs/studies/claim.py")
    parser.add_argument(
        "--workdir", required=True, type=terminal.path_argument, metavar="DIR", help="the directory of all repetitions"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="run only these variants")
    parser.add_argument(FALL_BACK_FLAG, action="store_true", help=FALL_BACK_HELP)
    args = parser.parse_args(argv)
    study = load(args.config)
    names = args.variants or list(study.variants)
    for name in names:
        if name not in study.variants:
            raise ConfigError(
                f"--variants {name}: not one of {', '.join(study.variants)}{nearest(name, study.variants)}"
            )
    run(study, names, args.workdir, from_earlier_step=args.from_earlier_step)


if __name__ == "__main__":
    terminal.run(main)
