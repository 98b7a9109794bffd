"""Compute our encoder's activations, and their differences from a `Reference`.

The batch is unpacked, with one example per row. Everything is float32, with matrix products at the highest precision.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import WeightSource

TOLERANCE = 1e-4
MAX_TOKENS = 128  # per example, so that a reference of a dozen examples stays small
_RANDOM_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, MAX_TOKENS)
_ONLY_IN_FIXTURES = {"prediction_logits", "seq_relationship_logits"}  # pretraining heads, as wide as a vocabulary


@dataclass(frozen=True)
class Difference:
    """The difference between one of our activations and the reference's.

    Attributes:
      name: the activation's name, as in `Reference.activations`.
      shape: its shape.
      maximum: the largest absolute difference.
      mean: the mean absolute difference.
      largest: the reference's largest magnitude.
      worst: the index of the largest difference; its first axis is the token or the example.
    """

    name: str
    shape: tuple[int, ...]
    maximum: float
    mean: float
    largest: float
    worst: tuple[int, ...]

    @property
    def allowed(self) -> float:
        """The bound on `maximum`: TOLERANCE, scaled by `largest` if that is above one."""
        return TOLERANCE * max(1.0, self.largest)

    @property
    def ok(self) -> bool:
        """Whether `maximum` is within the bound. NaN is not."""
        return self.maximum <= self.allowed


def pad(examples: Iterable[tuple[np.ndarray, np.ndarray]], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return a reference's inputs, each [N, S] int32, from examples of (ids, token types), both [length]."""
    rows = list(examples)
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    input_ids = np.full(shape, config.pad_id, np.int32)
    attention_mask, token_type_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, (ids, types) in enumerate(rows):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        token_type_ids[row, : len(ids)] = types
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


def limit(config: EncoderConfig) -> int:
    """Return the most tokens per example to give this model."""
    return min(MAX_TOKENS, config.max_positions - config.position_offset)


def random_inputs(config: EncoderConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random token ids, for a checkpoint without a tokenizer, as pairs if the model has token types."""
    rng = np.random.default_rng(seed)
    token_ids = np.delete(np.arange(config.vocab_size), config.pad_id)
    last_type = max(config.type_vocab_size, 1) - 1
    lengths = sorted({min(length, limit(config)) for length in _RANDOM_LENGTHS})
    return pad(
        ((rng.choice(token_ids, n), np.where(np.arange(n) < (n + 1) // 2, 0, last_type)) for n in lengths), config
    )


def batch_of(inputs: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return a reference's inputs as a batch for a classifier, with one example per row."""
    rows, length = inputs["input_ids"].shape
    positions = np.broadcast_to(config.position_offset + np.arange(length, dtype=np.int32), (rows, length))
    if FAMILIES[config.family].positions_after_pad:  # pad tokens within a text are not counted
        is_token = (inputs["input_ids"] != config.pad_id).astype(np.int32)
        positions = config.pad_id + np.cumsum(is_token, axis=1, dtype=np.int32) * is_token
    return {
        "input_ids": inputs["input_ids"],
        "token_type_ids": inputs["token_type_ids"],
        # Padding stays at the first position, so that padded rows may be longer than the model's positions.
        "position_ids": np.where(inputs["attention_mask"] == 1, positions, config.position_offset),
        "segment_ids": inputs["attention_mask"],
        "cls_index": np.zeros((rows, 1), np.int32),
    }


def activations(directory: str | Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our encoder's activations for a checkpoint, with the names and shapes of `Reference.activations`.

    `pooled` and `logits` are left out if the checkpoint lacks their weights. If `transformers` has no head that pools
    as the classifier does, the head reads the first token.
    """
    config = hf_config.read_config(directory)
    family = hf_config.read_family(directory)
    stored = WeightSource.open(directory, family).targets
    classes = stored["head.kernel"].shape[0] if "head.kernel" in stored else 2
    pooling = hf_config.read_pooling(directory)
    graphdef, params = hf_checkpoint.load_classifier(directory, classes, seed=0, pooling=pooling)

    @jax.jit
    def forward(params: nnx.State, batch: Mapping[str, jax.Array]) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        if not hf_config.transformers_pools(config.family, pooling):
            model.pooling = "cls"
        keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
        hidden = model.encoder.hidden_states(*(batch[key] for key in keys))  # L + 1 of [N, S, H]
        return hidden, model.pooled(batch)[:, 0], model(batch)[:, 0]  # [N, H], [N, K]

    with jax.default_matmul_precision("highest"):
        hidden, pooled, logits = forward(params, batch_of(inputs, config))
    real = np.asarray(inputs["attention_mask"]) == 1
    outputs = {f"layer_{i}" if i else "embeddings": np.asarray(state)[real] for i, state in enumerate(hidden)}
    if "pooler.dense.kernel" in stored and (family.pools_in_encoder or "head.kernel" in stored):
        outputs["pooled"] = np.asarray(pooled)
    if "head.kernel" in stored:
        outputs["logits"] = np.asarray(logits)
    return outputs


def compare(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> tuple[Difference, ...]:
    """Return the difference of each activation, in the reference's order.

    Raises:
      ValueError: one side lacks an activation, or the shapes differ.
    """
    names = [name for name in reference if name in ours or name not in _ONLY_IN_FIXTURES]
    if set(names) != set(ours):
        raise ValueError(f"our activations are {', '.join(ours)}; the reference has {', '.join(names)}")
    return tuple(_difference(name, ours[name], reference[name]) for name in names)


def _difference(name: str, ours: np.ndarray, reference: np.ndarray) -> Difference:
    if ours.shape != reference.shape:
        raise ValueError(f"our {name} is {list(ours.shape)}; the reference has {list(reference.shape)}")
    difference = np.abs(ours.astype(np.float64) - reference)
    # argmax treats the first NaN as the largest value, and so does max.
    worst = tuple(int(index) for index in np.unravel_index(np.argmax(difference), difference.shape))
    largest = float(np.max(np.abs(reference)))
    return Difference(name, ours.shape, float(difference.max()), float(difference.mean()), largest, worst)


def records(rows: Iterable[Difference]) -> list[dict[str, Any]]:
    """Return differences as JSON records. NaN and infinity become null."""

    def number(value: float) -> float | None:
        return value if np.isfinite(value) else None

    return [
        {
            "name": row.name,
            "shape": list(row.shape),
            "max_difference": number(row.maximum),
            "mean_difference": number(row.mean),
            "largest_reference": number(row.largest),
            "allowed": number(row.allowed),
            "ok": row.ok,
        }
        for row in rows
    ]
