"""From tokens to batches: random access for training, every example once for evaluation."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from xtransfer.data import packing
from xtransfer.data.text import Tokens

if TYPE_CHECKING:
    import grain

T = TypeVar("T")
Batch = dict[str, np.ndarray]

_EVAL_WINDOW = 4096  # examples packed together in evaluation: first fit is quadratic
_POLL_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class Dataset:
    """n tokenised examples with what is known of them.

    Attributes:
      tokens: token ids of the n examples.
      labels: [n] int32, −1 where there is none.
      teacher_logits: [n, num_classes] float32, or None.
      ids: n example ids.
      num_classes: K.

    Raises:
      ValueError: the parts differ in length, or a label is not below num_classes.
    """

    tokens: Tokens
    labels: np.ndarray
    teacher_logits: np.ndarray | None
    ids: tuple[str, ...]
    num_classes: int

    def __post_init__(self) -> None:
        """Checks the shapes once, so that no batch has to."""
        n = len(self.tokens)
        if self.labels.shape != (n,) or len(self.ids) != n:
            raise ValueError(f"{n} token lists, labels of shape {self.labels.shape}, {len(self.ids)} ids")
        if n and not -1 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(f"labels {self.labels.min()}..{self.labels.max()} with {self.num_classes} classes")
        if self.teacher_logits is not None and self.teacher_logits.shape != (n, self.num_classes):
            raise ValueError(
                f"teacher logits {self.teacher_logits.shape} for {n} examples × {self.num_classes} classes"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.tokens)


@dataclass(frozen=True)
class BatchPlan:
    """How batches are laid out.

    Attributes:
      batch_size: training: examples of a batch; evaluation: rows of a full batch, which take the same memory.
      row_length: tokens of a row (S).
      slots: examples of a row at most (M).
      pad_id: input id of the padding.
      position_offset: position id of an example's first token.
      multiple_of: the number of rows is a multiple of this.
      packed: False for one example per row.
    """

    batch_size: int
    row_length: int
    slots: int
    pad_id: int
    position_offset: int
    multiple_of: int
    packed: bool = True


def steps_per_epoch(dataset: Dataset, plan: BatchPlan) -> int:
    """Batches that together hold every example at least once."""
    return -(-len(dataset) // plan.batch_size)


class TrainBatches:
    """Endless training batches by random access: batch i depends on (dataset, plan, seed, i) and nothing else.

    Every epoch is a new order. Batches run over the epochs' ends, so each has exactly `batch_size` examples.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, seed: int) -> None:
        """Plans the batches; raises ValueError for an empty data set or a seed outside 0..2**32-1."""
        self._dataset = dataset
        self._plan = plan
        self._seed = seed
        self._lengths = dataset.tokens.lengths
        self.row_sizes = packing.row_sizes(
            self._lengths, plan.batch_size, plan.row_length, plan.slots, plan.multiple_of, packed=plan.packed
        )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} is outside 0..2**32-1")

    def __call__(self, i: int) -> Batch:
        """Batch i with the eight keys of a batch: [R, S], [R, M] and [R, M, K], R one of `row_sizes`."""
        indices = self.indices(i)
        placed = packing.place(
            self._lengths[indices], self._plan.row_length, self._plan.slots, packed=self._plan.packed
        )
        needed = packing.rows_used(placed)
        return _assemble(self._dataset, self._plan, indices, placed, next(r for r in self.row_sizes if r >= needed))

    def indices(self, i: int) -> np.ndarray:
        """[batch_size] int64, the examples of batch i."""
        return np.asarray(self._order[i], np.int64)

    def example_ids(self, i: int) -> tuple[str, ...]:
        """The ids of batch i's examples."""
        return tuple(self._dataset.ids[j] for j in self.indices(i))

    @cached_property
    def _order(self) -> "grain.MapDataset[np.ndarray]":
        import grain

        numbers = grain.MapDataset.source(range(len(self._dataset)))
        return numbers.seed(self._seed).shuffle().repeat().batch(self._plan.batch_size)


def eval_batches(dataset: Dataset, plan: BatchPlan) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example exactly once, in batches of two shapes: full ones, and a smaller one for a short last batch.

    The whole data set is packed at once, so batches hold as many examples as fit, not a fixed number. The shapes
    follow from the plan alone: all data sets of a plan share their compiled programs.

    Yields:
      ([n] int64 indices, batch). The order of the indices is that of the filled slots, row by row: index j belongs to
      `logits[batch["weight"] > 0][j]`.
    """
    full = packing.round_up(plan.batch_size, plan.multiple_of)
    short = packing.round_up(-(-full // 4), plan.multiple_of)
    indices, placed = _place_all(dataset, plan)
    for start in range(0, packing.rows_used(placed), full):
        here = slice(*np.searchsorted(placed[:, 0], [start, start + full]))
        local = placed[here] - np.asarray([start, 0], np.int32)
        rows = short if packing.rows_used(local) <= short else full
        yield indices[here], _assemble(dataset, plan, indices[here], local, rows)


def prefetch(iterator: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Runs an iterator in a thread, up to `depth` items ahead.

    What the iterator raises is raised here, in its turn. Closing this generator ends the thread.

    Raises:
      ValueError: depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth {depth} is below 1")
    return _prefetch(iterator, depth)


def _prefetch(iterator: Iterable[T], depth: int) -> Generator[T, None, None]:
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                items.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in iterator:
                if not put("item", item):
                    break
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        thread.join()


def _place_all(dataset: Dataset, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
    """All examples and their (row, slot), in the order of rows and slots; rows are numbered over the data set."""
    lengths = dataset.tokens.lengths
    windows = max(1, -(-len(dataset) // _EVAL_WINDOW)) if plan.packed else 1
    by_length = np.argsort(-lengths, kind="stable") if plan.packed else np.arange(len(dataset))
    parts, base = [], 0
    for window in range(windows):
        chosen = by_length[window::windows]  # each window sees all lengths
        placed = packing.place(lengths[chosen], plan.row_length, plan.slots, packed=plan.packed)
        order = np.lexsort((placed[:, 1], placed[:, 0]))
        parts.append((chosen[order], placed[order] + np.asarray([base, 0], np.int32)))
        base += packing.rows_used(placed)
    return np.concatenate([chosen for chosen, _ in parts]), np.concatenate([placed for _, placed in parts])


def _assemble(dataset: Dataset, plan: BatchPlan, indices: np.ndarray, placed: np.ndarray, rows: int) -> Batch:
    """A batch of `rows` rows. All processes make the global batch; a process's own rows would be sliced off here."""
    batch = packing.lay_out(
        dataset.tokens,
        indices,
        placed,
        row_length=plan.row_length,
        rows=rows,
        slots=plan.slots,
        pad_id=plan.pad_id,
        position_offset=plan.position_offset,
    )
    row, slot = placed[:, 0], placed[:, 1]
    label = np.full((rows, plan.slots), -1, np.int32)
    label[row, slot] = dataset.labels[indices]
    logits = np.zeros((rows, plan.slots, dataset.num_classes), np.float32)
    if dataset.teacher_logits is not None:
        logits[row, slot] = dataset.teacher_logits[indices]
    weight = np.zeros((rows, plan.slots), np.float32)
    weight[row, slot] = 1.0
    return batch | {"label": label, "teacher_logits": logits, "weight": weight}
