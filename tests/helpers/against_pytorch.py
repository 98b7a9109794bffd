"""Compare our classifier on packed rows with PyTorch on padded rows: activations and gradients."""

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

ACTIVATION_TOLERANCE = 1e-4  # largest absolute difference
GRADIENT_TOLERANCE = 1e-3  # largest difference, relative to the largest number of the same gradient
ROW_LENGTH = 32

Batch = dict[str, jax.Array]


def packed(ref: Reference, offset: int, pad_id: int) -> Batch:
    """Pack the reference's padded examples, several to a row, and add a row that is all padding."""
    real = ref.inputs["attention_mask"] == 1
    tokens = Tokens(
        input_ids=ref.inputs["input_ids"][real],
        token_type_ids=ref.inputs["token_type_ids"][real],
        offsets=np.concatenate([[0], np.cumsum(real.sum(1))]),
        truncated=np.zeros(len(real), bool),
    )
    batch = pack(
        tokens, range(len(tokens)), row_length=ROW_LENGTH, rows=3, slots=4, pad_id=pad_id, position_offset=offset
    )
    assert len({row for row, _ in batch["slot"].tolist()}) < len(tokens)
    return {name: jnp.asarray(value) for name, value in batch.items()}


def check(directory: Path, ref: Reference) -> dict[str, float]:
    """Compare our model with the reference and return the largest difference of each kind."""
    config = hf_config.read_config(directory)
    batch = packed(ref, config.position_offset, config.pad_id)
    classes = ref.activations["logits"].shape[1] if "logits" in ref.activations else 2
    pooling = hf_config.read_pooling(directory) if "logits" in ref.activations else "cls"
    graphdef, params = hf_checkpoint.load_classifier(directory, classes, seed=0, pooling=pooling)

    rows, slots = batch["slot"].T
    labels = jnp.zeros(len(rows), jnp.int32) if ref.labels is None else jnp.asarray(ref.labels)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(batch)[rows, slots]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)), logits

    # Run without jit. The cases share the shapes of most operations, so little is compiled.
    model = nnx.merge(graphdef, params)
    keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
    activations = {f"layer_{i}": x for i, x in enumerate(model.encoder.hidden_states(*(batch[key] for key in keys)))}
    if "pooled" in ref.activations:
        activations["pooled"] = model.pooled(batch)[rows, slots]
    gradients: Any = {}
    if ref.gradients:
        (_, activations["logits"]), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    packed_order = np.argsort(np.asarray(batch["slot"]) @ [ROW_LENGTH, 1])
    activations["embeddings"] = activations.pop("layer_0")
    differences = {}
    for name in set(ref.activations) & set(activations):
        ours, theirs = np.asarray(activations[name]), ref.activations[name]
        if name not in ("pooled", "logits"):  # one vector per token, which the rows hold in packed order
            real = ref.inputs["attention_mask"] == 1
            theirs = np.concatenate([np.split(theirs, np.cumsum(real.sum(1))[:-1])[i] for i in packed_order])
            ours = ours[np.asarray(batch["segment_ids"]) > 0]
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        differences[name] = float(np.abs(ours - theirs).max())
    assert {"embeddings", "layer_1"} <= set(differences)
    assert max(differences.values()) <= ACTIVATION_TOLERANCE, differences
    if ref.gradients:
        differences["gradients"] = check_gradients(config.family, gradients, ref.gradients)
    return differences


def check_gradients(family: str, gradients: nnx.State, theirs: Any) -> float:
    """Return the largest relative difference between our gradient of a parameter and the reference's."""
    table, ours = FAMILIES[family], {path: np.asarray(leaf[...]) for path, leaf in leaves(gradients).items()}
    expected = {}
    for name, value in theirs.items():
        targets = table.targets(table.canonical(name))
        assert targets, name
        for (path, layout), rows in zip(targets, np.split(value, len(targets)), strict=True):
            expected[path] = rows.T if layout.transposed else rows
    assert set(expected) == set(ours)
    largest = max(float(np.abs(value).max()) for value in expected.values())
    differences = {}
    for path, value in expected.items():
        cancels = np.abs(value).max() < 1e-6 * largest
        if path.endswith("key.bias") and cancels:  # in softmax, unless scores depend on positions
            assert np.abs(ours[path]).max() < 1e-6 * largest
        else:
            assert np.abs(value).max() > 1e-4 * largest, path
            differences[path] = float(np.abs(ours[path] - value).max() / np.abs(value).max())
    assert max(differences.values()) <= GRADIENT_TOLERANCE, differences
    return max(differences.values())
