"""The depth of every parameter of every architecture, and the learning rates that follow from it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.test_meshes import BERT, CLASSES, SIZES
from tests.train.test_meshes_of_architectures import SETTINGS
from xtransfer.config import ModelConfig, parse
from xtransfer.errors import UserError
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.hf.checkpoint import abstract_classifier
from xtransfer.runtime.sharding import make_mesh, path_name
from xtransfer.train import optimizer
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.depth import depth

EXACT = {"b1": 0.5, "b2": 0.75, "eps": 1e-12}  # whose corrections are exact in float32
PARAMS = {
    "encoder": {
        "embeddings": {"word_embeddings": {"embedding": jnp.ones((2, 2))}},
        "layers": {0: {"output": {"kernel": jnp.ones((2, 2))}}, 1: {"output": {"kernel": jnp.ones((2, 2))}}},
        "final_norm": {"scale": jnp.ones(2)},
    },
    "pooler": {"dense": {"kernel": jnp.ones((2, 2))}},
    "head": {"bias": jnp.ones(2)},
}


@pytest.mark.parametrize("name", ["bert", *SETTINGS])
def test_every_parameter_has_a_depth(name: str) -> None:
    sizes: dict[str, Any] = SIZES | {"num_layers": 2}
    settings = SETTINGS.get(name, {})
    if "layer_types" in settings:
        settings = settings | {"layer_types": settings["layer_types"] * 2}
    config = ARCHITECTURES[name].config_class(vocab_size=61, **sizes, **settings, architecture=name)
    shapes = abstract_classifier(config, 2)[1]
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    depths = {name: depth(name, 2) for name in names}
    assert set(depths.values()) == {0, 1, 2, 3}
    assert depths["encoder.embeddings.word_embeddings.embedding"] == 0
    assert {value for name, value in depths.items() if ".layers.0." in name} == {1}
    assert {value for name, value in depths.items() if ".layers.1." in name or ".final_norm." in name} == {2}
    assert {value for name, value in depths.items() if not name.startswith("encoder.")} == {3}
    assert {value for name, value in depths.items() if ".relative_" in name} <= {0}


def test_an_unknown_part_of_an_encoder_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"encoder\.gate\.kernel has no depth"):
        depth("encoder.gate.kernel", 2)


def test_rates_shrink_from_the_head_to_the_embeddings() -> None:
    """Two layers, so the factors are 1 for the head, 1/2 and 1/4 for the layers, and 1/8 for the embeddings."""
    tx = optimizer.adamw(weight_decay=0.5, clip_norm=0.0, layer_decay=0.5, num_layers=2, **EXACT)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS, learning_rate=0.1)
    encoder = updates["encoder"]
    decayed = -0.1 * (1 + 0.5)  # Adam's first step and the weight decay of a matrix of ones
    np.testing.assert_allclose(updates["head"]["bias"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["pooler"]["dense"]["kernel"], decayed, rtol=1e-6)
    np.testing.assert_allclose(encoder["final_norm"]["scale"], -0.1 / 2, rtol=1e-6)
    np.testing.assert_allclose(encoder["layers"][1]["output"]["kernel"], decayed / 2, rtol=1e-6)
    np.testing.assert_allclose(encoder["layers"][0]["output"]["kernel"], decayed / 4, rtol=1e-6)
    np.testing.assert_allclose(encoder["embeddings"]["word_embeddings"]["embedding"], decayed / 8, rtol=1e-6)


def test_frozen_layers_do_not_move_the_others() -> None:
    frozen = (r"\.embeddings\.", r"\.layers\.0\.")
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=0.0, layer_decay=0.5, num_layers=2, frozen=frozen, **EXACT)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS, learning_rate=0.1)
    np.testing.assert_array_equal(updates["encoder"]["layers"][0]["output"]["kernel"], 0)
    np.testing.assert_allclose(updates["encoder"]["layers"][1]["output"]["kernel"], -0.05, rtol=1e-6)


def test_without_the_setting_the_optimizer_is_the_same() -> None:
    plain = optimizer.adamw(weight_decay=0.5, clip_norm=1.0)
    off = optimizer.adamw(weight_decay=0.5, clip_norm=1.0, layer_decay=ModelConfig().layer_decay, num_layers=2)
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(off.init(PARAMS))
    gradients = jax.tree.map(lambda leaf: 0.3 * leaf, PARAMS)
    expected, actual = (tx.update(gradients, tx.init(PARAMS), PARAMS, learning_rate=0.1)[0] for tx in (plain, off))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_setting_reaches_the_training_step() -> None:
    settings = ModelConfig(layer_decay=0.5, weight_decay=0)
    compiled = CompiledSteps(settings, BERT, CLASSES, make_mesh())
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), compiled.shapes)
    tx: optax.GradientTransformationExtraArgs = compiled.optimizer
    updates, _ = tx.update(params, tx.init(params), params, learning_rate=0.1)
    by_name = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    for name, factor in {"head.bias": 1, "encoder.layers.0.output.bias": 2, "encoder.embeddings.norm.bias": 4}.items():
        np.testing.assert_allclose(by_name[name], -0.1 / factor, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_an_impossible_factor_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"student\.layer_decay is {value}: it must be between 0\.001 and 1"):
        parse({"student": {"layer_decay": value}})
