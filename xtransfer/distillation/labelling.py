"""Label the transfer set with the teacher: fill a logits store shard by shard, and survive interruptions."""

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np

from xtransfer.distillation.logits_store import LogitsStore
from xtransfer.errors import CheckpointError
from xtransfer.runtime import processes

_log = logging.getLogger(__name__)


def label(
    store: LogitsStore,
    predict: Callable[[np.ndarray], np.ndarray],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Compute the missing shards of the store, in order. All processes take part, and process 0 writes.

    Args:
      store: complete shards are left alone, and damaged ones are written again.
      predict: returns raw logits, np.float32 [n, K], for positions in `store.ids`, np.int64 [n].
      progress: called with the number of examples in each finished shard.

    Returns:
      The number of examples that were computed, 0 if the store was complete.

    Raises:
      UserError: logits of another shape, or not finite.
    """
    computed = 0
    for shard in processes.on_first(store.missing_shards):
        if processes.is_first() and store.exists(shard):
            _log.warning("%s: %s, so labelling its examples again", store.directory, store.fault(shard))
        indices = store.shard_indices(shard)
        logits = predict(indices)
        processes.on_first(functools.partial(store.write_shard, shard, logits))
        computed += len(indices)
        if progress is not None:
            progress(len(indices))
    return computed


def permute_classes(logits: np.ndarray, teacher_classes: Sequence[str], student_classes: Sequence[str]) -> np.ndarray:
    """Return the teacher's logits with their columns in the student's order of classes, matched by name.

    Args:
      logits: [..., K], columns as in `teacher_classes`.
      teacher_classes: K different names.
      student_classes: the same names in any order.

    Returns:
      [..., K], columns as in `student_classes`, with the dtype of `logits`.

    Raises:
      UserError: teacher and student do not name the same classes, each once.
    """
    teacher, student = list(teacher_classes), list(student_classes)
    if sorted(teacher) != sorted(student) or len(set(teacher)) != len(teacher):
        raise CheckpointError(
            f"teacher and student differ in classes: the teacher has {teacher}, the student has {student}"
        )
    if logits.shape[-1] != len(teacher):
        raise CheckpointError(f"logits of shape {logits.shape} for the {len(teacher)} classes {teacher}")
    return logits[..., [teacher.index(name) for name in student]]
