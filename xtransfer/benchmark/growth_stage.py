"""A stage of `growth` that is no command: read the text, or tokenise it, in a process of its own."""

from collections.abc import Callable

from xtransfer import config as settings
from xtransfer.config import ExperimentConfig, cache_dir
from xtransfer.data.registry import load_task
from xtransfer.distillation import transfer_set
from xtransfer.runtime import terminal
from xtransfer.train.inputs import ModelInputs


def _read(config: ExperimentConfig) -> None:
    """Read the transfer set, which leaves large text in the cache."""
    transfer_set.gather(config, load_task(config.task))


def _tokenise(config: ExperimentConfig, role: str) -> None:
    examples = transfer_set.gather(config, load_task(config.task))
    model = config.teacher if role == "teacher" else config.student
    inputs = ModelInputs(role, model, shards=1, token_cache=cache_dir(config.task) / "tokens")
    inputs.tokens(examples.everything, examples.drawn_from)


STAGES: dict[str, Callable[[ExperimentConfig], None]] = {
    "reading": _read,
    "tokenising for the teacher": lambda config: _tokenise(config, "teacher"),
    "tokenising for the student": lambda config: _tokenise(config, "student"),
}
"""The stages by name, in order."""


def main(argv: list[str]) -> None:
    """Run the stage of a name for the config in a file."""
    name, path = argv
    STAGES[name](settings.load(path, []))


if __name__ == "__main__":
    terminal.run(main)
