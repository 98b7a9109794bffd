"""Scoring any classifier on any task: a finished run or a Hugging Face directory, without the experiment around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from xtransfer.data.batches.batches import Dataset, eval_batches, make_plan
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.examples import sides
from xtransfer.data.task import Example, Task
from xtransfer.data.tokens.tokenizer import tokenize
from xtransfer.errors import CheckpointError
from xtransfer.evaluation import metrics
from xtransfer.models import inference
from xtransfer.models.hf.tokenizer import check_pairs
from xtransfer.runs.classifier import TrainedClassifier
from xtransfer.runtime.sharding import data_shards


@dataclass(frozen=True, eq=False)
class LanguageResult:
    """A classifier's results on one split of one language.

    Attributes:
      language: the language.
      examples: the n examples.
      logits: [n, K] float32, columns in the task's order of classes.
      scores: the metrics.
      truncated: the number of examples that are longer than the classifier reads.
    """

    language: str
    examples: Sequence[Example]
    logits: np.ndarray
    scores: Sequence[metrics.Score]
    truncated: int


class ClassifierScorer:
    """A classifier on a task, compiled once for all languages.

    Args:
      classifier: the classifier, with its parameters on `mesh`.
      task: the task.
      mesh: the device mesh.
      rows: the rows of a batch; 0 chooses a number for the devices.

    Raises:
      UserError: the classes of the classifier and the task differ.
    """

    def __init__(self, classifier: TrainedClassifier, task: Task, mesh: jax.sharding.Mesh, rows: int = 0):
        self._classifier, self._task, self._mesh = classifier, task, mesh
        self._order = class_order(classifier, task)
        self._step = inference.make_eval_step(classifier.graphdef, mesh)
        self._plan = make_plan(
            rows or inference.default_rows(mesh, classifier.max_length),
            classifier.max_length,
            pad_id=classifier.architecture.pad_id,
            position_offset=classifier.architecture.position_offset,
            multiple_of=data_shards(mesh),
        )

    def score(
        self, split: str, language: str, names: Sequence[str], on_batch: Callable[[int], None] | None = None
    ) -> LanguageResult:
        """Return the results on one split of one language; call `on_batch` with the size of each batch.

        Args:
          split: a labelled split.
          language: one of the task's languages.
          names: metrics that `metrics.check_names` accepts.
          on_batch: called after each batch.

        Raises:
          UserError: data are missing or malformed, the logits are not finite, or the labels do not define a metric.
        """
        examples, classes = self._task.load(split, language), len(self._task.labels)
        texts, pairs = sides(examples)
        if pairs is not None:
            check_pairs(self._classifier.directory, self._classifier.tokenizer)
        tokens = tokenize(self._classifier.tokenizer, texts, pairs, self._classifier.max_length)
        gold, ids = self._task.gold(examples), tuple(example.id for example in examples)
        batches = prefetch(eval_batches(Dataset(tokens, gold, None, ids, classes), self._plan))
        logits = inference.predict(
            self._step, self._classifier.params, self._mesh, batches, len(examples), classes, on_batch=on_batch
        )[:, self._order]
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise CheckpointError(
                f"{self._classifier.source}: the logits of {len(bad)} examples are not finite; the first is "
                f"{ids[bad[0]]}: the classifier is damaged"
            )
        scores = metrics.scores(logits, gold, self._task.labels, names)
        return LanguageResult(language, examples, logits, scores, int(np.count_nonzero(tokens.truncated)))


def class_order(classifier: TrainedClassifier, task: Task) -> list[int]:
    """Return, for each class of the task, its column in the classifier's logits, matched by name.

    Raises:
      UserError: they do not name the same classes, or only one of the two gives a text several labels.
    """
    if classifier.multi_label != task.multi_label:
        kinds = ("one label", "any number of labels (multi-label)")
        raise CheckpointError(
            f"{classifier.source}: the classifier gives a text {kinds[classifier.multi_label]}, and the task "
            f"{task.name} has {kinds[task.multi_label]}: set task.multi_label as the classifier was trained, or name "
            "another one"
        )
    if sorted(classifier.labels) != sorted(task.labels):
        raise CheckpointError(
            f"{classifier.source}: its classes are {', '.join(classifier.labels)}, and the classes of {task.name} are "
            f"{', '.join(task.labels)}: if they are the same, write the task's names into id2label of config.json"
        )
    return [classifier.labels.index(label) for label in task.labels]
