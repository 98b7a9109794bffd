"""The transfer set: the labelled and unlabelled source text that a student learns from."""

from dataclasses import dataclass

from xtransfer.config import ExperimentConfig
from xtransfer.data.sampling import labelled_subset, unlabelled_examples
from xtransfer.data.task import UNLABELLED, Example, Task
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.runtime import terminal


@dataclass(frozen=True)
class TransferSet:
    """What is learnt from, all in the source language.

    Attributes:
      labelled: L.
      unlabelled: U.
      dev: the split that chooses checkpoints.
      drawn_from: the whole splits that have L and U in them.
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
    """Reads the source language's splits and draws L and U from them."""
    settings = config.task
    train = task.load("train", task.source_language)
    labelled = labelled_subset(train, settings.labelled, settings.labelled_seed, task.labels)
    needs_text = any(OBJECTIVES[name].data == "all" for name in config.objectives)
    kind = settings.unlabelled_from if needs_text else "none"
    unlabelled = unlabelled_examples(task, kind, settings.unlabelled, settings.labelled_seed, labelled)
    if needs_text and not unlabelled:
        terminal.log("warning: no unlabelled text: lower task.labelled (train_rest takes what it leaves), or add some")
    drawn_from = [train]
    if unlabelled and kind != "train_rest":
        drawn_from.append(task.load(UNLABELLED, task.source_language))
    return TransferSet(labelled, unlabelled, task.load("dev", task.source_language), tuple(drawn_from))
