"""Our encoder's activations, and their differences from a `Reference`.

The batch is unpacked, with one example per row. Everything is float32, at the highest precision of matrix products.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import gather_tokens
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import WeightSource

TOLERANCE = 1e-4
LONGEST = 128  # tokens of an example, so that a reference of twelve examples stays small
_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, LONGEST)  # of the random examples
_ONLY_IN_FIXTURES = {"prediction_logits", "seq_relationship_logits"}  # pretraining heads, as wide as a vocabulary


@dataclass(frozen=True)
class Difference:
    """The difference between our activation and the reference's.

    Attributes:
      maximum: the largest absolute difference.
      mean: the mean absolute difference.
      largest: the reference's largest magnitude.
      worst: the index of the maximum, token or example first.
    """

    name: str
    shape: tuple[int, ...]
    maximum: float
    mean: float
    largest: float
    worst: tuple[int, ...]

    @property
    def allowed(self) -> float:
        """The bound on `maximum`: TOLERANCE, relative if the reference has values above one."""
        return TOLERANCE * max(1.0, self.largest)

    @property
    def ok(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.maximum <= self.allowed


def pad(examples: Iterable[tuple[np.ndarray, np.ndarray]], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return the inputs of a reference, each [N, S] int32, from examples of ids and token types, both [length]."""
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
    """Return the most tokens of an example in an input for this model."""
    return min(LONGEST, config.max_positions - config.position_offset)


def random_inputs(config: EncoderConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random token ids, for a checkpoint without a tokenizer; the second half has the last token type."""
    rng = np.random.default_rng(seed)
    words = np.delete(np.arange(config.vocab_size), config.pad_id)
    last = max(config.type_vocab_size, 1) - 1
    lengths = sorted({min(length, limit(config)) for length in _LENGTHS})
    return pad(((rng.choice(words, n), np.where(np.arange(n) < (n + 1) // 2, 0, last)) for n in lengths), config)


def batch_of(inputs: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
    """Return the inputs of a reference as a classifier's batch with one example per row."""
    rows, length = inputs["input_ids"].shape
    positions = np.broadcast_to(config.position_offset + np.arange(length, dtype=np.int32), (rows, length))
    if FAMILIES[config.family].positions_after_pad:  # a pad token within a text does not count
        words = (inputs["input_ids"] != config.pad_id).astype(np.int32)
        positions = config.pad_id + np.cumsum(words, axis=1, dtype=np.int32) * words
    return {
        "input_ids": inputs["input_ids"],
        "token_type_ids": inputs["token_type_ids"],
        # Padding stays at the first position: a row may be longer than the model if the rest is padding.
        "position_ids": np.where(inputs["attention_mask"] == 1, positions, config.position_offset),
        "segment_ids": inputs["attention_mask"],
        "cls_index": np.zeros((rows, 1), np.int32),
    }


def activations(directory: str | Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what our encoder computes with a checkpoint, in the names and shapes of `Reference.activations`.

    `pooled` and `logits` only occur if the file has their weights. The head reads the first token even if the
    classifier pools by the mean, because `transformers` has no other head.
    """
    config = hf_config.read_config(directory)
    heads = WeightSource.open(directory, FAMILIES[config.family]).targets
    classes = heads["head.kernel"].shape[0] if "head.kernel" in heads else 2
    pooling = hf_config.read_pooling(directory)
    graphdef, params = hf_checkpoint.load_classifier(directory, classes, seed=0, pooling=pooling)

    @jax.jit
    def forward(params: nnx.State, batch: Mapping[str, jax.Array]) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        model.pooling = "cls"
        keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
        hidden = model.encoder.hidden_states(*(batch[key] for key in keys))  # L + 1 of [N, S, H]
        pooled = model.pooler(gather_tokens(hidden[-1], batch["cls_index"]))  # [N, 1, H], without a third encoder
        return hidden, pooled[:, 0], model(batch)[:, 0]  # [N, H], [N, K]

    with jax.default_matmul_precision("highest"):
        hidden, pooled, logits = forward(params, batch_of(inputs, config))
    real = np.asarray(inputs["attention_mask"]) == 1
    found = {f"layer_{i}" if i else "embeddings": np.asarray(state)[real] for i, state in enumerate(hidden)}
    if "pooler.dense.kernel" in heads:
        found["pooled"] = np.asarray(pooled)
    if "head.kernel" in heads:
        found["logits"] = np.asarray(logits)
    return found


def compare(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> tuple[Difference, ...]:
    """Return a row for each activation, in the reference's order.

    Raises:
      ValueError: one side lacks an activation, or has it in another shape.
    """
    names = [name for name in reference if name in ours or name not in _ONLY_IN_FIXTURES]
    if set(names) != set(ours):
        raise ValueError(f"activations {', '.join(ours)} against {', '.join(names)} of the reference")
    return tuple(_row(name, ours[name], reference[name]) for name in names)


def _row(name: str, ours: np.ndarray, reference: np.ndarray) -> Difference:
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: {list(ours.shape)} against {list(reference.shape)} of the reference")
    difference = np.abs(ours.astype(np.float64) - reference)
    # argmax treats the first NaN as the largest value, and so does max.
    worst = tuple(int(index) for index in np.unravel_index(np.argmax(difference), difference.shape))
    largest = float(np.max(np.abs(reference)))
    return Difference(name, ours.shape, float(difference.max()), float(difference.mean()), largest, worst)


def records(rows: Iterable[Difference]) -> list[dict[str, Any]]:
    """Return the rows for a JSON file; NaN and infinity become null."""

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
