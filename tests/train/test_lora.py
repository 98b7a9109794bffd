"""LoRA: by hand, merged, saved, and resumed; the same on every mesh; and without the memory of a whole encoder."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import tiny
from tests.train.test_meshes import BERT, SIZES, batch, compiled_steps, params
from tests.train.test_meshes_of_architectures import SETTINGS
from xtransfer.config import LoraConfig, ModelConfig, parse
from xtransfer.data.task import Example
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.models.adapter import Adapter
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.inference import place_params
from xtransfer.models.layers import linear
from xtransfer.runtime import sharding, terminal
from xtransfer.train import lora, metrics_log, state
from xtransfer.train.checkpoints import PARAMS, RESUME, Checkpoints
from xtransfer.train.finetuning import Finetuner

ALL_LINEAR = LoraConfig(rank=2, alpha=3.0, targets=(r"\.kernel$",))
EVERY_LAYER = LoraConfig(rank=2, alpha=3.0, targets=(r"\.layers\.\d+\..*\.kernel$",))


def by_name(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in state.select(tree, sharding.names_of(tree)).items()}


def test_an_adapter_by_hand() -> None:
    """x = (1, 2), a = (1, 1)ᵀ, b = (1, −1), and a scale of 2: x a = 3, and the output is (6, −6)."""
    layer = linear(2, 2, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.array([[10.0, 0.0], [0.0, 10.0]])
    layer.adapter = Adapter(2, 2, rank=1, scale=2.0)
    x = jnp.array([[[1.0, 2.0]]])  # [1, 1, 2]
    np.testing.assert_array_equal(layer(x), [[[10, 20]]])  # new adapters add nothing
    layer.adapter.a[...], layer.adapter.b[...] = jnp.ones((2, 1)), jnp.array([[1.0, -1.0]])
    np.testing.assert_array_equal(layer(x), [[[16, 14]]])
    np.testing.assert_array_equal(layer.to_columns(x), [[[16], [14]]])
    np.testing.assert_array_equal(layer.from_columns(jnp.swapaxes(x, 1, 2)), [[[16, 14]]])


def test_merging_by_hand() -> None:
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    plain = {"layer": {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.ones(2)}}
    adapted = {
        "layer": plain["layer"] | {"adapter": {"a": jnp.array([[2.0, 0.0]]), "b": jnp.array([[3.0, 5], [7, 9]])}}
    }
    merged = lora.merger(plain, mesh, LoraConfig(rank=2, alpha=4.0))(adapted)
    np.testing.assert_array_equal(merged["layer"]["kernel"], [[1 + 2 * 6, 2 + 2 * 10]])
    assert merged["layer"]["bias"] is adapted["layer"]["bias"] and set(merged["layer"]) == {"kernel", "bias"}


def with_random_adapters(tree: Any) -> Any:
    """Return parameters whose adapters matter as much as the kernels beside them."""

    def draw(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if ".adapter." not in sharding.path_name(path):
            return leaf
        return 0.5 * jax.random.normal(jax.random.key(len(sharding.path_name(path))), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize("name", ["bert", *SETTINGS])
def test_the_merged_classifier_has_the_same_logits(name: str) -> None:
    """Of every architecture, with adapters at every linear layer of the encoder."""
    config = ARCHITECTURES[name].config_class(vocab_size=61, **SIZES, **SETTINGS.get(name, {}), architecture=name)
    compiled = compiled_steps((1, 1, 1), architecture=config, lora=EVERY_LAYER)
    start = compiled.initial_state(params(config), 0)
    saving = compiled.saving(lambda: params(config), 0)
    changed = start._replace(params=with_random_adapters(start.params))
    inputs = sharding.place_batch(compiled.mesh, batch())
    used = batch()["weight"] > 0
    model = nnx.merge(compiled._training_graphdef, changed.params)
    merged = nnx.merge(compiled.graphdef, saving.saved(changed).params)
    actual, expected, before = (
        np.asarray(jax.jit(lambda m: m(inputs))(m))[used]
        for m in (merged, model, nnx.merge(compiled.graphdef, params(config)))
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
    assert np.abs(expected - before).max() > 0.01
    assert sharding.names_of(saving.saved(changed).params) == sharding.names_of(params(config))


def trained(shape: tuple[int, int, int], architecture: EncoderConfig = BERT, **settings: Any) -> tuple[Any, Any, Any]:
    """Train three steps, and return the compiled steps, the first state, and the last, on the host.

    With a large eps, Adam's update is proportional to the gradient, and does not magnify rounding.
    """
    settings = {"adam_eps": 1.0, "lora": ALL_LINEAR} | settings
    compiled = compiled_steps(shape, architecture=architecture, **settings)
    current = compiled.initial_state(params(architecture), 0)
    first = by_name(current.params)
    step = compiled.train_step(OBJECTIVES["monox_kd"])
    for _ in range(3):
        current, _ = step(current, sharding.place_batch(compiled.mesh, batch()), jax.random.key(5), np.float32(1.0))
    return compiled, first, current


def test_only_adapters_and_head_are_trained_and_have_optimizer_state() -> None:
    compiled, before, last = trained((1, 1, 1))
    after = by_name(last.params)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    expected = {name for name in after if ".adapter." in name or not name.startswith("encoder.")}
    assert changed == expected
    assert sum(".adapter.a" in name for name in after) == 6  # query, key, value, output, and the feed-forward's two
    moments = [name for name in sharding.names_of(last.opt_state) if ".mu." in f".{name}" or ".nu." in f".{name}"]
    assert len(moments) == 2 * len(expected)
    assert compiled.trained_share == sum(after[name].size for name in expected) / sum(x.size for x in after.values())


def test_frozen_layers_get_no_adapter() -> None:
    frozen = (r"\.output\.", r"^pooler\.", r"word_embeddings")
    _, before, last = trained((1, 1, 1), frozen=frozen)
    after = by_name(last.params)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert {name.rsplit(".", 3)[1] for name in changed if ".adapter." in name} == {
        "query",
        "key",
        "value",
        "intermediate",
    }
    assert not any(name.startswith("pooler.") for name in changed)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_training_in_microbatches_with_remat_matches_one_device(shape: tuple[int, int, int]) -> None:
    settings = {"ema_decay": 0.5, "layer_decay": 0.5}
    _, _, expected = trained((1, 1, 1), **settings)
    compiled, first, actual = trained(shape, accumulation=2, remat=True, **settings)
    for mine, theirs in ((actual.params, expected.params), (actual.ema, expected.ema)):
        mine, theirs = by_name(mine), by_name(theirs)
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], atol=2e-5, rtol=0, err_msg=name)
    moved = by_name(expected.params)
    assert max(np.abs(moved[name] - first[name]).max() for name in moved if ".adapter." in name) > 1e-3
    saving = compiled.saving(lambda: place_params(compiled.mesh, params(BERT)), 0)
    saved = saving.saved(actual)
    for weights, wanted in zip(jax.tree.leaves(saved.params), jax.tree.leaves(compiled.abstract_params()), strict=True):
        assert (weights.shape, weights.sharding) == (wanted.shape, wanted.sharding)
    restored = saving.restored(saved)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(actual), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding


def test_gradients_and_optimizer_state_take_no_space() -> None:
    """By the compiler's count, on one device, for 12 MB of encoder of which a percent is trained."""
    wide = EncoderConfig(
        vocab_size=61, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, max_positions=32
    )

    def sizes(**settings: Any) -> tuple[int, int]:
        compiled = compiled_steps((1, 1, 1), architecture=wide, **settings)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch().items()}
        step = compiled.train_step(OBJECTIVES["vanilla"])
        program = step.lower(*compiled.training_arguments(shapes)).compile()
        memory = program.memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    encoder = 4 * sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(compiled_steps((1, 1, 1), architecture=wide).shapes)
        if sharding.path_name(path).startswith("encoder.layers.")
    )
    (whole, whole_temporary), (adapted, adapted_temporary) = sizes(), sizes(lora=LoraConfig(rank=4))
    assert 1.9 * encoder < whole - adapted < 2.1 * encoder  # two moments
    assert whole_temporary - adapted_temporary > 0.8 * encoder  # most of the gradient


def finetuner(checkpoint: Path, **settings: Any) -> Finetuner:
    config = {
        "steps": 8,
        "evaluations": 2,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "lora": LoraConfig(rank=2),
    } | settings
    return Finetuner(
        "student",
        ModelConfig(checkpoint=str(checkpoint), max_length=12, **config),
        ("bad", "good"),
        sharding.make_mesh(),
        eval_batch_size=8,
    )


def train(model: Finetuner, directory: Path) -> None:
    words = ("good", "bad", "great", "poor")
    examples = [Example(f"t/train/en/{i}", f"the film is {words[i % 4]}", None, 1 - i % 2, "en") for i in range(24)]
    dataset = model.dataset(examples)

    def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"dev_accuracy": float((logits.argmax(-1) == labels).mean())}

    model.train(directory, OBJECTIVES["vanilla"], dataset, {"en": dataset}, 3, scores)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=2)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_an_interrupted_run_resumes_exactly(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float
) -> None:
    settings = {"ema_decay": ema_decay, "average_last": 2, "frozen": (r"^pooler\.",)}
    model = finetuner(checkpoint, **settings)
    train(model, tmp_path / "whole")
    polls = iter([False] * 5 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
        with pytest.raises(SystemExit):
            train(model, tmp_path / "cut")
    train(finetuner(checkpoint, **settings), tmp_path / "cut")
    cut, whole = (metrics_log.read_metrics(tmp_path / name)[-1] for name in ("cut", "whole"))
    assert (cut["dev_accuracy"], cut[metrics_log.AVERAGED]) == (whole["dev_accuracy"], whole[metrics_log.AVERAGED])
    arrays: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name in ("whole", "cut"):
        with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
            for item in (PARAMS, RESUME, "average"):
                arrays[name, item] = checkpoints.restore_arrays(8, item)
    for item in (PARAMS, RESUME, "average"):
        assert arrays["cut", item].keys() == arrays["whole", item].keys()
        for name, expected in arrays["whole", item].items():
            np.testing.assert_array_equal(arrays["cut", item][name], expected, err_msg=name)
    base = by_name(model.fresh_params(3))
    saved = arrays["whole", PARAMS]
    assert saved.keys() == base.keys()  # a plain classifier, whose other kernels are the checkpoint's
    changed = {name for name in base if not np.array_equal(saved[name], base[name])}
    assert changed == {
        *(f"encoder.layers.{i}.attention.{name}.kernel" for i in (0, 1) for name in ("query", "value")),
        *("head.kernel", "head.bias"),
    }
    assert not any("embeddings" in name for name in arrays["whole", RESUME])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"alpha": 8.0}}, r"student\.lora\.rank is 0, which turns LoRA off: give a rank"),
        ({"lora": {"rank": -1}}, r"student\.lora\.rank is -1: it must be between 0"),
        ({"lora": {"rank": 4, "alpha": 0.0}}, r"student\.lora\.alpha is 0\.0: it must be between 0\.001"),
        ({"lora": {"rank": 4, "targets": ()}}, r"student\.lora\.targets is \(\): name the kernels"),
        ({"lora": {"rank": 4, "targets": ("(",)}}, r"student\.lora\.targets: '\(' is not a regular expression"),
        ({"lora": {"rank": 4}, "reinit_layers": 1}, r"student\.lora\.rank and student\.reinit_layers: with LoRA"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse({"student": settings})


def test_targets_and_ranks_that_do_not_fit_the_encoder_are_refused_before_training(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.targets 'word_embeddings' matches no kernel of a linear layer"):
        finetuner(checkpoint, lora=LoraConfig(rank=2, targets=("word_embeddings",)))
    with pytest.raises(UserError, match=r"frozen patterns match every kernel that lora\.targets names"):
        finetuner(checkpoint, frozen=(r"^encoder\.",))
    with pytest.raises(UserError, match=r"lora\.rank is 17: the largest that makes sense for .* is 16"):
        finetuner(checkpoint, lora=LoraConfig(rank=17))


def test_without_lora_nothing_changes() -> None:
    compiled = compiled_steps((1, 1, 1))
    assert compiled._training_graphdef is compiled.graphdef and compiled._training_shapes is compiled.shapes
    assert not any("adapter" in name for name in sharding.names_of(compiled.abstract_state))
