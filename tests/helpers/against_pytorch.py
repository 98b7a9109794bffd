"""Holds our classifier, on packed rows, against what PyTorch computed on padded ones: activations and gradients."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xtransfer.data.batches.packing import pack
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import leaves
from xtransfer.parity.reference import Reference

LOGITS = 1e-4  # largest absolute difference
GRADIENTS = 1e-3  # largest difference, relative to the largest number of the same gradient
ROW = 32

Batch = dict[str, jax.Array]


def packed(ref: Reference, offset: int, pad_id: int) -> Batch:
    """The reference's examples, which it has in padded rows, several to a row, and a row of padding only."""
    real = ref.inputs["attention_mask"] == 1
    tokens = Tokens(
        input_ids=ref.inputs["input_ids"][real],
        token_type_ids=ref.inputs["token_type_ids"][real],
        offsets=np.concatenate([[0], np.cumsum(real.sum(1))]),
    )
    batch = pack(tokens, range(len(tokens)), row_length=ROW, rows=3, slots=4, pad_id=pad_id, position_offset=offset)
    assert len({row for row, _ in batch["slot"].tolist()}) < len(tokens)
    return {name: jnp.asarray(value) for name, value in batch.items()}


def check(directory: Path, ref: Reference) -> dict[str, float]:
    """Holds our model against the reference; the largest difference of each kind."""
    config = hf_config.read_config(directory)
    batch = packed(ref, config.position_offset, config.pad_id)
    classes = ref.activations["logits"].shape[1] if "logits" in ref.activations else 2
    graphdef, params = hf_checkpoint.load_classifier(directory, classes, seed=0)

    rows, slots = batch["slot"].T
    labels = jnp.zeros(len(rows), jnp.int32) if ref.labels is None else jnp.asarray(ref.labels)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(batch)[rows, slots]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)), logits

    # Without jit: the cases share most of their operations' shapes, so that little is compiled.
    model = nnx.merge(graphdef, params)
    keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
    found = {f"layer_{i}": x for i, x in enumerate(model.encoder.hidden_states(*(batch[key] for key in keys)))}
    if "pooled" in ref.activations:
        found["pooled"] = model.pooled(batch)[rows, slots]
    gradients: Any = {}
    if ref.gradients:
        (_, found["logits"]), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    order = np.argsort(np.asarray(batch["slot"]) @ [ROW, 1])  # of the examples in the rows
    found["embeddings"] = found.pop("layer_0")
    differences = {}
    for name in set(ref.activations) & set(found):
        ours, theirs = np.asarray(found[name]), ref.activations[name]
        if name not in ("pooled", "logits"):  # tokens in the order of the rows
            real = ref.inputs["attention_mask"] == 1
            theirs = np.concatenate([np.split(theirs, np.cumsum(real.sum(1))[:-1])[i] for i in order])
            ours = ours[np.asarray(batch["segment_ids"]) > 0]
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        differences[name] = float(np.abs(ours - theirs).max())
    assert {"embeddings", "layer_1"} <= set(differences)
    assert max(differences.values()) <= LOGITS, differences
    if ref.gradients:
        differences["gradients"] = check_gradients(config.family, gradients, ref.gradients)
    return differences


def check_gradients(family: str, gradients: nnx.State, theirs: Any) -> float:
    """The largest relative difference of a leaf's gradient."""
    table, ours = FAMILIES[family], {path: np.asarray(leaf[...]) for path, leaf in leaves(gradients).items()}
    wanted = {}
    for name, value in theirs.items():
        target = table.target(table.canonical(name))
        assert target is not None, name
        wanted[target[0]] = value.T if target[1] == "transpose" else value
    assert set(wanted) == set(ours)
    largest = max(float(np.abs(value).max()) for value in wanted.values())
    differences = {}
    for path, value in wanted.items():
        if path.endswith("key.bias"):  # softmax does not see it, so that its gradient is zero but for rounding
            assert max(np.abs(value).max(), np.abs(ours[path]).max()) < 1e-6 * largest
        else:
            assert np.abs(value).max() > 1e-4 * largest
            differences[path] = float(np.abs(ours[path] - value).max() / np.abs(value).max())
    assert max(differences.values()) <= GRADIENTS, differences
    return max(differences.values())
