"""Batches to logits: the one compiled forward that labelling, evaluation and prediction share."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xtransfer.runtime.sharding import batch_sharding, param_shardings, place_batch, replicated, traced_for

INPUTS = ("input_ids", "segment_ids", "position_ids", "token_type_ids", "cls_index")
_IN_FLIGHT = 3  # batches on the device while the host packs the next and reads the last

T = TypeVar("T")
EvalStep = Callable[[nnx.State, Mapping[str, jax.Array]], jax.Array]


def make_eval_step(graphdef: Any, mesh: Mesh) -> EvalStep:
    """The compiled (params, batch) -> logits [R, M, K] float32, without dropout.

    Parameters keep the sharding that they come with (see `place_params`); rows are split over `data × fsdp`,
    and the logits, which are few, are whole on every device, so that each process has all of them. It compiles once
    per shape of batch, so batches should have few shapes.
    """

    def logits(params: nnx.State, batch: Mapping[str, jax.Array]) -> jax.Array:
        with traced_for(mesh):
            return nnx.merge(graphdef, params)(batch)  # [R, M, K]

    return jax.jit(logits, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def place_params(mesh: Mesh, params: nnx.State) -> nnx.State:
    """Parameters laid out on the mesh by the rules of `sharding`; free where they lie so already."""
    return jax.device_put(params, param_shardings(mesh, params))


def forward(
    eval_step: EvalStep, params: nnx.State, mesh: Mesh, batches: Iterable[tuple[T, Mapping[str, np.ndarray]]]
) -> Iterator[tuple[T, np.ndarray]]:
    """From (tag, batch) to (tag, logits [b, K] float32 of the b filled slots (weight > 0), row by row), in order.

    Works a few batches ahead of the reader, so that the device computes while the host packs and writes.
    """
    params = place_params(mesh, params)
    waiting: deque[tuple[T, np.ndarray, jax.Array]] = deque()

    def oldest() -> tuple[T, np.ndarray]:
        tag, filled, result = waiting.popleft()
        return tag, np.asarray(result)[filled]

    for tag, batch in batches:
        result = eval_step(params, place_batch(mesh, {key: batch[key] for key in INPUTS}))
        result.copy_to_host_async()
        waiting.append((tag, batch["weight"] > 0, result))
        if len(waiting) >= _IN_FLIGHT:
            yield oldest()
    while waiting:
        yield oldest()


def predict(
    eval_step: EvalStep,
    params: nnx.State,
    mesh: Mesh,
    batches: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]],
    n: int,
    num_classes: int,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Logits [n, K] float32 in the order of the dataset.

    `batches` gives (indices [b] int64, batch): the indices name the examples of the filled slots (weight > 0), row by
    row. All n examples come exactly once, in any order (ValueError otherwise). `on_batch(b)` hears of each result.
    """
    logits = np.full((n, num_classes), np.nan, np.float32)
    seen = np.zeros(n, np.int64)
    for indices, found in forward(eval_step, params, mesh, batches):
        logits[indices] = found
        np.add.at(seen, indices, 1)
        if on_batch is not None:
            on_batch(len(indices))
    if wrong := np.flatnonzero(seen != 1).tolist():
        raise ValueError(f"{len(wrong)} of {n} examples did not come exactly once, the first is {wrong[0]}")
    return logits
