"""Tokens to batches: random access for training, and every example once for evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from xtransfer.data.batches import packing
from xtransfer.data.tokens.samples import AnyTokens
from xtransfer.data.tokens.tokenizer import Tokens, concatenate

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

_TOKENS_PER_SLOT = 8  # a row has a slot for every 8 tokens: examples are seldom shorter
_SHORTEST_ROW = 128  # tokens; in shorter rows attention costs less, but texts fill them badly
_EVAL_WINDOW = 4096  # examples packed together in evaluation, because first fit is quadratic


@dataclass(frozen=True, eq=False)
class Dataset:
    """n tokenized examples with their labels and, for a student, the teacher's logits.

    Attributes:
      tokens: token ids of the n examples.
      labels: [n] int32, −1 without a label; in a multi-label task [n, num_classes], see `task.gold`.
      teacher_logits: [n, num_classes] float32, or None.
      ids: n example ids, perhaps on disk.
      num_classes: K.

    Raises:
      ValueError: the fields differ in length, or a label is not below num_classes.
    """

    tokens: AnyTokens
    labels: np.ndarray
    teacher_logits: np.ndarray | None
    ids: Sequence[str]
    num_classes: int

    def __post_init__(self) -> None:
        """Check the shapes once, so that no batch has to."""
        n = len(self.tokens)
        if self.labels.shape not in ((n,), (n, self.num_classes)) or len(self.ids) != n:
            raise ValueError(f"{n} token lists, labels of shape {self.labels.shape}, {len(self.ids)} ids")
        highest = self.num_classes - 1 if self.labels.ndim == 1 else 1
        if n and not -1 <= self.labels.min() <= self.labels.max() <= highest:
            raise ValueError(f"labels {self.labels.min()}..{self.labels.max()} with {self.num_classes} classes")
        if self.teacher_logits is not None and self.teacher_logits.shape != (n, self.num_classes):
            raise ValueError(
                f"teacher logits {self.teacher_logits.shape} for {n} examples × {self.num_classes} classes"
            )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.tokens)

    def take(self, indices: np.ndarray) -> "Dataset":
        """Return the examples `indices` [m] as a dataset, in that order."""
        logits = None if self.teacher_logits is None else self.teacher_logits[indices]
        ids = tuple(self.ids[i] for i in indices)
        return Dataset(self.tokens.take(indices), self.labels[indices], logits, ids, self.num_classes)


@dataclass(frozen=True)
class BatchPlan:
    """The layout of batches.

    Attributes:
      batch_size: in training, examples per batch; in evaluation, rows of a full batch, which take the same memory.
      row_length: tokens per row (S).
      slots: the most examples per row (M).
      pad_id: the input id of padding.
      position_offset: the position id of an example's first token.
      multiple_of: the number of rows is a multiple of this.
      packed: False for one example per row.
      process_slice: (p, n): make only the p-th of n equal runs of rows of every batch, for process p of n. The global
        batch is the same for any n, which must divide `multiple_of`.
      fitted_sizes: in training, see `packing.row_sizes`.
      microbatch_rows: in training, see `packing.round_up_rows`.
    """

    batch_size: int
    row_length: int
    slots: int
    pad_id: int
    position_offset: int
    multiple_of: int
    packed: bool = True
    process_slice: tuple[int, int] = (0, 1)
    fitted_sizes: int = packing.FITTED_SIZES
    microbatch_rows: int | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError for rows that cannot be divided."""
        index, count = self.process_slice
        if not 0 <= index < count or self.multiple_of % count:
            raise ValueError(f"slice {index} of {count} of batches with a multiple of {self.multiple_of} rows")


def make_plan(
    batch_size: int, row_length: int, *, pad_id: int, position_offset: int, multiple_of: int, packed: bool = True
) -> BatchPlan:
    """Return a `BatchPlan` with these settings, and with as many slots per row as suit its length (one if unpacked)."""
    return BatchPlan(
        batch_size=batch_size,
        row_length=row_length,
        slots=max(1, row_length // _TOKENS_PER_SLOT) if packed else 1,
        pad_id=pad_id,
        position_offset=position_offset,
        multiple_of=multiple_of,
        packed=packed,
    )


class Numbers(Sequence[str]):
    """The ids "0", "1", … of n examples that have no others."""

    def __init__(self, n: int) -> None:
        self._range = range(n)

    def __len__(self) -> int:
        """Return n."""
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        """Return an id, or a list of ids."""
        return list(map(str, self._range[index])) if isinstance(index, slice) else str(self._range[index])


class TrainBatches:
    """Endless training batches by random access: batch i depends on (dataset, plan, seed, i) and nothing else.

    Every epoch has a new order. Batches run across the ends of epochs, so each has exactly `batch_size` examples.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, seed: int) -> None:
        """Plan the batches; raise a ValueError for an empty dataset or a seed outside 0..2**32-1."""
        self._dataset = dataset
        self._plan = plan
        self._seed = seed
        self._lengths = dataset.tokens.lengths
        self.row_sizes = packing.row_sizes(
            self._lengths,
            plan.batch_size,
            plan.row_length,
            plan.slots,
            plan.multiple_of,
            packed=plan.packed,
            fitted_sizes=plan.fitted_sizes,
            microbatch_rows=plan.microbatch_rows,
        )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} is outside 0..2**32-1")

    def __call__(self, i: int) -> Batch:
        """Return batch i with all keys of a batch, [R, S], [R, M], and [R, M, K], where R is one of `row_sizes`.

        In a multi-label task, `label` is [R, M, K].
        """
        indices = self.indices(i)
        placed = packing.place(
            self._lengths[indices], self._plan.row_length, self._plan.slots, packed=self._plan.packed
        )
        needed = packing.rows_used(placed)
        rows = next(size for size in self.row_sizes if size >= needed)
        return _assemble(self._dataset, self._plan, indices, placed, rows)[1]

    def indices(self, i: int) -> np.ndarray:
        """Return the examples of batch i, [batch_size] int64."""
        return np.asarray(self._order[i], np.int64)

    def real_share(self, batches: int) -> float:
        """Return the share of the first batches that is tokens of examples, and not padding."""
        real = total = 0
        for i in range(batches):
            lengths = self._lengths[self.indices(i)]
            needed = packing.rows_needed(lengths, self._plan.row_length, self._plan.slots, packed=self._plan.packed)
            real += int(lengths.sum())
            total += next(size for size in self.row_sizes if size >= needed) * self._plan.row_length
        return real / total

    @cached_property
    def _order(self) -> "grain.MapDataset[np.ndarray]":
        import grain

        numbers = grain.MapDataset.source(range(len(self._dataset)))
        return numbers.seed(self._seed).shuffle().repeat().batch(self._plan.batch_size)


def eval_batches(dataset: Dataset, plan: BatchPlan) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield every example exactly once, in batches of two shapes: full ones, and a smaller one for a short last batch.

    The whole dataset is packed at once, so batches hold as many examples as fit, and not a fixed number. The shapes
    follow from the plan alone, so all datasets of a plan share their compiled steps.

    Yields:
      ([n] int64 indices, batch). The indices are in the order of the filled slots, row by row: index j belongs to
      `logits[batch["weight"] > 0][j]`.
    """
    indices, placed = _place_all(dataset, plan)
    yield from _cut(dataset, plan, indices, placed)


def eval_row_sizes(plan: BatchPlan) -> tuple[int, int]:
    """Return the rows of the two shapes of `eval_batches`: a full batch, and a smaller one for a short last batch."""
    full = packing.round_up(plan.batch_size, plan.multiple_of)
    return full, packing.round_up(-(-full // 4), plan.multiple_of)


def empty_batch(plan: BatchPlan, rows: int, num_classes: int, *, multi_label: bool = False) -> Batch:
    """Return a batch of the plan without an example: the shapes and dtypes of every batch with `rows` rows."""
    nothing = concatenate([])
    labels = np.zeros((0, num_classes) if multi_label else 0, np.int32)
    dataset = Dataset(nothing, labels, None, (), num_classes)
    return _assemble(dataset, plan, np.zeros(0, np.int64), np.zeros((0, 2), np.int32), rows)[1]


def make_plans(
    batch_size: int, max_length: int, *, pad_id: int, position_offset: int, multiple_of: int
) -> tuple[BatchPlan, ...]:
    """Return plans with 128, 256, 512, … up to max_length tokens per row, each with batch_size × 128 tokens per batch.

    Short texts go into short rows, because attention costs more in longer ones.
    """
    row_lengths = [_SHORTEST_ROW]
    while row_lengths[-1] * 2 < max_length:
        row_lengths.append(row_lengths[-1] * 2)
    row_lengths = [length for length in row_lengths if length < 0.75 * max_length] + [max_length]
    return tuple(
        make_plan(
            max(1, round(batch_size * _SHORTEST_ROW / row_length)),
            row_length,
            pad_id=pad_id,
            position_offset=position_offset,
            multiple_of=multiple_of,
        )
        for row_length in row_lengths
    )


def batches_by_length(
    tokens: Tokens, num_classes: int, plans: Sequence[BatchPlan]
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield every example exactly once, in a row of the shortest plan that holds it, or of a longer one.

    Rows that do not fill a batch move to the next longer plan that has examples of its own, so at most one batch is not
    full.

    Args:
      tokens: n examples, none longer than the last plan's rows.
      num_classes: K.
      plans: in ascending order of row length.

    Yields:
      (indices, batch), see `eval_batches`.

    Raises:
      ValueError: an example is longer than all rows.
    """
    n, lengths = len(tokens), tokens.lengths
    if n and lengths.max() > plans[-1].row_length:
        raise ValueError(f"an example of {lengths.max()} tokens for rows of up to {plans[-1].row_length}")
    dataset = Dataset(tokens, np.full(n, -1, np.int32), None, Numbers(n), num_classes)
    plan_indices = np.searchsorted([plan.row_length for plan in plans], lengths)  # [n], the plan of each example
    used = np.unique(plan_indices)
    leftover = np.zeros(0, np.int64)
    for i in used:
        plan = plans[i]
        indices, placed = _place(lengths, np.concatenate([np.flatnonzero(plan_indices == i), leftover]), plan)
        if i != used[-1]:
            full = packing.round_up(plan.batch_size, plan.multiple_of)
            whole = int(np.searchsorted(placed[:, 0], packing.rows_used(placed) // full * full))
            indices, placed, leftover = indices[:whole], placed[:whole], indices[whole:]
        yield from _cut(dataset, plan, indices, placed)


def _place_all(dataset: Dataset, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return all examples and their (row, slot), in this order; rows are numbered across the dataset."""
    lengths = dataset.tokens.lengths
    windows = max(1, -(-len(dataset) // _EVAL_WINDOW)) if plan.packed else 1
    by_length = np.argsort(-lengths, kind="stable") if plan.packed else np.arange(len(dataset))
    parts, base = [], 0
    for window in range(windows):
        # Each window has examples of all lengths.
        indices, placed = _place(lengths, by_length[window::windows], plan)
        parts.append((indices, placed + np.asarray([base, 0], np.int32)))
        base += packing.rows_used(placed)
    return np.concatenate([indices for indices, _ in parts]), np.concatenate([placed for _, placed in parts])


def _place(lengths: np.ndarray, indices: np.ndarray, plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return some examples and their (row, slot), in the order of rows and slots."""
    placed = packing.place(lengths[indices], plan.row_length, plan.slots, packed=plan.packed)
    order = np.lexsort((placed[:, 1], placed[:, 0]))
    return indices[order], placed[order]


def _cut(
    dataset: Dataset, plan: BatchPlan, indices: np.ndarray, placed: np.ndarray
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield batches of the plan's two sizes from examples in the order of rows and slots."""
    full, short = eval_row_sizes(plan)
    for start in range(0, packing.rows_used(placed), full):
        in_batch = slice(*np.searchsorted(placed[:, 0], [start, start + full]))
        local = placed[in_batch] - np.asarray([start, 0], np.int32)
        rows = short if packing.rows_used(local) <= short else full
        yield _assemble(dataset, plan, indices[in_batch], local, rows)


def _assemble(
    dataset: Dataset, plan: BatchPlan, indices: np.ndarray, placed: np.ndarray, rows: int
) -> tuple[np.ndarray, Batch]:
    """Return the plan's slice of a batch of `rows` rows, and the examples in it in the order of `indices`."""
    index, count = plan.process_slice
    slice_rows = rows // count
    inside = placed[:, 0] // slice_rows == index
    indices, placed = indices[inside], placed[inside] - np.asarray([index * slice_rows, 0], np.int32)
    batch = packing.lay_out(
        dataset.tokens,
        indices,
        placed,
        row_length=plan.row_length,
        rows=slice_rows,
        slots=plan.slots,
        pad_id=plan.pad_id,
        position_offset=plan.position_offset,
    )
    row, slot = placed[:, 0], placed[:, 1]
    label = np.full((slice_rows, plan.slots, *dataset.labels.shape[1:]), -1, np.int32)
    label[row, slot] = dataset.labels[indices]
    logits = np.zeros((slice_rows, plan.slots, dataset.num_classes), np.float32)
    if dataset.teacher_logits is not None:
        logits[row, slot] = dataset.teacher_logits[indices]
    weight = np.zeros((slice_rows, plan.slots), np.float32)
    weight[row, slot] = 1.0
    return indices, batch | {"label": label, "teacher_logits": logits, "weight": weight}
