"""Batches to logits: the compiled forward pass that labelling, evaluation, and prediction share."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xtransfer.runtime import processes
from xtransfer.runtime.sharding import batch_sharding, data_shards, on_mesh, param_shardings, place_batch, replicated

INPUTS = ("input_ids", "segment_ids", "position_ids", "token_type_ids", "cls_index")
_IN_FLIGHT = 3  # batches on the device while the host packs the next and reads the last

# A CPU is fastest with small batches: buffers over 32 MB go back to the system after every batch, and it clears their
# pages before it hands them out again. An accelerator needs large ones.
_TOKENS_PER_CORE, _MOST_CORES = 1024, 8
_TOKENS_PER_ACCELERATOR, _MOST_ACCELERATORS = 256 * 128, 16

T = TypeVar("T")
EvalStep = Callable[[nnx.State, Mapping[str, jax.Array]], jax.Array]


def default_rows(mesh: Mesh, row_length: int) -> int:
    """Return a number of rows per global batch that suits the devices of a mesh and the tokens of a row.

    It depends on this machine's cores, so processes that share batches must take it from one of them.
    """
    if mesh.devices.flat[0].platform == "cpu":
        tokens = _TOKENS_PER_CORE * min(processes.cores(), _MOST_CORES)
    else:
        tokens = _TOKENS_PER_ACCELERATOR * min(data_shards(mesh), _MOST_ACCELERATORS)
    return max(1, tokens // row_length)


def make_eval_step(graphdef: Any, mesh: Mesh) -> EvalStep:
    """Return the compiled function (params, batch) -> logits [R, M, K] float32, without dropout.

    Parameters keep their sharding (see `place_params`), and rows are split over `data × fsdp`. The logits are small and
    replicated on every device, so each process has all of them. The function compiles once per batch shape, so use few
    shapes.
    """

    def logits(params: nnx.State, batch: Mapping[str, jax.Array]) -> jax.Array:
        with on_mesh(mesh):
            return nnx.merge(graphdef, params)(batch)  # [R, M, K]

    return jax.jit(logits, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def place_params(mesh: Mesh, params: nnx.State) -> nnx.State:
    """Lay out parameters on the mesh by the rules of `sharding`; this costs nothing if they already are."""
    return jax.device_put(params, param_shardings(mesh, params))


def forward(
    eval_step: EvalStep, params: nnx.State, mesh: Mesh, batches: Iterable[tuple[T, Mapping[str, np.ndarray]]]
) -> Iterator[tuple[T, np.ndarray]]:
    """Yield (tag, logits [b, K] float32) for each (tag, batch), in order; b counts the filled slots, row by row.

    A slot is filled if its weight is above 0. A few batches are in flight, so that the device computes while the host
    packs and writes.
    """
    params = place_params(mesh, params)
    waiting: deque[tuple[T, np.ndarray, jax.Array]] = deque()

    def take_oldest() -> tuple[T, np.ndarray]:
        tag, filled, result = waiting.popleft()
        return tag, np.asarray(result)[filled]

    for tag, batch in batches:
        result = eval_step(params, place_batch(mesh, {key: batch[key] for key in INPUTS}))
        result.copy_to_host_async()
        waiting.append((tag, batch["weight"] > 0, result))
        if len(waiting) >= _IN_FLIGHT:
            yield take_oldest()
    while waiting:
        yield take_oldest()


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
    """Return the logits of a whole dataset, [n, K] float32, in its order.

    Args:
      eval_step: from `make_eval_step`.
      params: the parameters.
      mesh: the device mesh.
      batches: (indices [b] int64, batch) pairs. The indices name the examples in the filled slots, row by row.
      n: the number of examples in the dataset.
      num_classes: K.
      on_batch: called with b after each batch.

    Raises:
      ValueError: an example does not occur exactly once in the batches.
    """
    logits = np.full((n, num_classes), np.nan, np.float32)
    seen = np.zeros(n, np.int64)
    for indices, batch_logits in forward(eval_step, params, mesh, batches):
        logits[indices] = batch_logits
        np.add.at(seen, indices, 1)
        if on_batch is not None:
            on_batch(len(indices))
    wrong = np.flatnonzero(seen != 1).tolist()
    if wrong:
        raise ValueError(f"{len(wrong)} of {n} examples do not occur exactly once; the first is {wrong[0]}")
    return logits
