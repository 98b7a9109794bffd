"""What the teachers say about the transfer set, from stored logits or files, before any student is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer import storage
from xtransfer.config import ExperimentConfig, user_path
from xtransfer.data.examples import are_labelled, ids_of, in_languages, languages_of
from xtransfer.data.task import Example, Task
from xtransfer.distillation import transfer_set
from xtransfer.distillation.logits_store import LogitsStore, open_store
from xtransfer.distillation.teachers import log_probabilities
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.runs import teachers
from xtransfer.runs.workdir import Workdir

MEAN = "mean"
"""The name of the mean of several teachers."""


@dataclass(frozen=True)
class Opinion:
    """A teacher's probabilities for L or U in one language, at temperature 1.

    Attributes:
      teacher: its config key, or `MEAN`.
      language: the language of the examples.
      name: "L" or "U".
      examples: the number of examples.
      classes: the number of examples by the class with the highest probability, in the task's order; in a multi-label
        task, by each class with a probability above 0.5.
      entropy: the mean entropy of the probabilities, in nats; in a multi-label task, its sum over the classes.
      agreement: the share of labelled examples whose label is that class, or whose labels are those classes; None
        without labels.
      disagreement: for the mean of several teachers, their mean Jensen-Shannon divergence, in nats.
    """

    teacher: str
    language: str
    name: str
    examples: int
    classes: tuple[int, ...]
    entropy: float
    agreement: float | None = None
    disagreement: float | None = None


def opinions(
    experiment: ExperimentConfig,
    task: Task,
    transfer: TransferSet,
    workdir: Workdir | None,
) -> list[Opinion]:
    """Return the opinions of the files that exist, and of the complete stores of a workdir.

    Args:
      experiment: the config of one draw.
      task: its task.
      transfer: the draw's transfer set.
      workdir: the experiment's workdir with the draw, or None.

    Raises:
      UserError: a file or a store is malformed.
    """
    found: dict[str, tuple[Sequence[Example], np.ndarray, np.ndarray | None]] = {}
    for member, settings in experiment.members.items():
        if settings.is_file and user_path(settings.logits_file).is_file():
            examples: Sequence[Example] = teachers.read_by(experiment, member, transfer.everything)
            file = teachers.read_file(experiment, member, task.labels, [transfer])
            found[member] = examples, file.of(ids_of(examples)), None
    for teacher, examples, store in _stores(experiment, task, transfer, workdir):
        found[teacher] = examples, store.read(store.ids), store.disagreement()
    order = [*experiment.members, MEAN]
    names = [name for name in sorted(found, key=order.index) if found[name][0]]  # some may have no L and no U
    return [opinion for name in names for opinion in _by_set(name, task, *found[name])]


def _stores(
    experiment: ExperimentConfig,
    task: Task,
    transfer: TransferSet,
    workdir: Workdir | None,
) -> Iterator[tuple[str, Sequence[Example], LogitsStore]]:
    """Yield (teacher, examples, store) for the complete stores of a workdir that hold this transfer set."""
    if workdir is None:
        return
    # The vanilla student and teachers of the same checkpoint have stores too, so only the weights say whose one is.
    owners = {teachers.fingerprint(workdir.member(member)): member for member in experiment.members}
    for path in sorted(workdir.logits.glob("*/manifest.json")):
        manifest = storage.read_object(path, f"delete {path.parent} to label again")
        match manifest:
            case {"key": dict(key), "classes": list(classes), "shard_size": int(size)} if classes == list(task.labels):
                pass
            case _:
                continue
        member = owners.get(str(key.get("teacher_fingerprint")))
        if str(key.get("teacher_fingerprint")).startswith("mean "):
            member = MEAN
        if member is None:
            continue
        examples = transfer.everything if member == MEAN else teachers.read_by(experiment, member, transfer.everything)
        if key["data_fingerprint"] == transfer_set.fingerprint(examples):
            store = open_store(path.parents[1], key, classes=classes, ids=ids_of(examples), shard_size=size)
            if store.complete:
                yield member, examples, store


def _by_set(
    teacher: str, task: Task, examples: Sequence[Example], logits: np.ndarray, disagreement: np.ndarray | None
) -> Iterator[Opinion]:
    """Yield a teacher's opinion on each language's L and U."""
    log_q = log_probabilities(logits, multi_label=task.multi_label)  # [n, K], or [n, K, 2]
    entropy = -(np.exp(log_q) * log_q).reshape(len(logits), -1).sum(axis=1)
    if task.multi_label:
        guesses = logits > 0
        is_right = (guesses == task.gold(examples)).all(axis=1)
    else:
        guesses = logits.argmax(axis=1, keepdims=True) == np.arange(logits.shape[1])  # [n, K]
        is_right = logits.argmax(axis=1) == task.gold(examples)
    is_labelled = are_labelled(examples)
    for language in languages_of(examples):
        inside = in_languages(examples, (language,))
        for name in ("L", "U"):
            rows = inside[is_labelled[inside] == (name == "L")]
            if len(rows):
                yield Opinion(
                    teacher,
                    language,
                    name,
                    len(rows),
                    tuple(guesses[rows].sum(axis=0).tolist()),
                    float(entropy[rows].mean()),
                    float(is_right[rows].mean()) if name == "L" else None,
                    None if disagreement is None else float(disagreement[rows].mean()),
                )
