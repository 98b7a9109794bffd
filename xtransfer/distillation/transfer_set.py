"""The transfer set: the labelled and unlabelled source text that a student learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

from xtransfer.config import ExperimentConfig
from xtransfer.data.sampling import labelled_subset, unlabelled_examples
from xtransfer.data.task import UNLABELLED, Example, Task
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import ConfigError
from xtransfer.runtime import terminal


@dataclass(frozen=True)
class TransferSet:
    """The text that teacher and student learn from, all in the source language.

    Attributes:
      labelled: L, with labels.
      unlabelled: U, without labels.
      dev: the split that checkpoints are selected on.
      drawn_from: the whole splits that L and U were drawn from.
    """

    labelled: list[Example]
    unlabelled: list[Example]
    dev: list[Example]
    drawn_from: tuple[list[Example], ...]

    @property
    def everything(self) -> list[Example]:
        """L ∪ U."""
        return self.labelled + self.unlabelled


def gather(config: ExperimentConfig, task: Task) -> TransferSet:
    """Read the source language's splits, and draw L and U from them.

    Raises:
      UserError: a split is missing or malformed, too small for L or U, or L has no example of a class.
    """
    settings = config.task
    train = task.load("train", task.source_language)
    labelled = labelled_subset(train, settings.labelled, settings.labelled_seed, task.labels)
    _check_classes(labelled, task.labels, settings.labelled)
    objectives = definitions(config)
    needs_unlabelled = any(objectives[name].data == "all" for name in config.objectives)
    kind = settings.unlabelled_from if needs_unlabelled else "none"
    unlabelled = unlabelled_examples(task, kind, settings.unlabelled, settings.labelled_seed, labelled)
    if needs_unlabelled and not unlabelled:
        terminal.log(
            "warning: no unlabelled text: lower task.labelled (train_rest takes the rest of train), or add some"
        )
    drawn_from = [train]
    if unlabelled and kind != "train_rest":
        drawn_from.append(task.load(UNLABELLED, task.source_language))
    return TransferSet(labelled, unlabelled, task.load("dev", task.source_language), tuple(drawn_from))


def _check_classes(labelled: Sequence[Example], labels: Sequence[str], requested: int) -> None:
    """Refuse a class that no model would learn."""
    used = {label for example in labelled for label in example.classes or ()}
    missing = [repr(name) for label, name in enumerate(labels) if label not in used]
    if missing:
        remedy = f"raise it to {len(labels)} or more" if requested else "add some to train"
        raise ConfigError(f"task.labelled {requested} leaves no example of {', '.join(missing)} to train on: {remedy}")
