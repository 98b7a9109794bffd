"""Pretrain a small encoder on a task's own text.

    python -m xtransfer.pretrain --config configs/pretrain_mini.py:english --output DIR

Train a masked language model from scratch, or continue a checkpoint (`start_from`) on more text. Translation pairs are
used if the languages have parallel text. The result is a Hugging Face checkpoint. The embedded ones were made this way.
An interrupted run resumes from `DIR.work/`, which is kept afterwards for its `metrics.jsonl`.
"""

from xtransfer import config
from xtransfer.config import PretrainConfig
from xtransfer.errors import ConfigError
from xtransfer.pretrain.pretraining import pretrain
from xtransfer.runtime import terminal
from xtransfer.train import logger_flags
from xtransfer.train.checkpoints import FALL_BACK_FLAG, FALL_BACK_HELP


def main(argv: list[str]) -> None:
    """Parse the flags and pretrain."""
    parser = terminal.parser("pretrain", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="the recipe, such as configs/pretrain_mini.py:english"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=terminal.path_argument,
        metavar="DIR",
        help="the checkpoint to write, which must not exist",
    )
    parser.add_argument(FALL_BACK_FLAG, action="store_true", help=FALL_BACK_HELP)
    logger_flags.add_flags(parser)
    args, overrides = parser.parse_known_args(argv)
    if args.output.exists():
        raise ConfigError(f"{args.output} already exists; choose another --output")
    settings = config.load(args.config, overrides, PretrainConfig)
    loggers = logger_flags.parse_flags(args)
    pretrain(settings, args.output, from_earlier_step=args.from_earlier_step, loggers=loggers)


if __name__ == "__main__":
    terminal.run(main)
