"""The BERT encoder, its relatives and their heads as Flax NNX modules.

Shapes: R rows, S tokens a row, M examples a row, P masked positions a row, H hidden size, N heads, D = H / N,
F feed-forward size, E embedding size, V vocabulary, K classes. Parameters are float32; `dtype` is the dtype of the
large matrix products. Softmax, LayerNorm statistics, pooler and logits are float32 whatever `dtype` is.

Sources: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Liu et al., "RoBERTa",
2019; Sanh et al., "DistilBERT", 2019; Clark et al., "ELECTRA", ICLR 2020.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Batch = Mapping[str, jax.Array]

POOLINGS = ("cls", "mean")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_python": partial(jax.nn.gelu, approximate=False),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

_INHERITED = {"embedding_size": "hidden_size", "classifier_dropout": "hidden_dropout"}  # what None stands for

_NORMAL = nnx.initializers.normal(0.02)
_MASKED = -1e9  # added to a float32 score: exp gives exactly 0, and a wholly masked row stays finite


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of an encoder and its classification head, as its checkpoint states it; by default BERT's.

    `position_offset` is the position id of an example's first token; `type_vocab_size` 0 means no token types;
    `embedding_size` None means `hidden_size`, another size is projected; `classifier_dropout` None means
    `hidden_dropout`. `attention_output_dropout`: whether there is dropout between a layer's attention and its residual;
    `head_input_dropout`: whether the head drops its input too. `family` names the table of weights.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    pad_id: int = 0
    position_offset: int = 0
    embedding_size: int | None = None
    attention_output_dropout: bool = True
    head_act: str = "tanh"
    head_input_dropout: bool = False
    family: str = "bert"

    def effective(self, field: str) -> Any:
        """A field's value or, where that is None, the value that it stands for."""
        value = getattr(self, field)
        return getattr(self, _INHERITED[field]) if value is None and field in _INHERITED else value


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout: zero with probability `rate`, else x / (1 - rate). No key: x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype))


def _site(key: jax.Array | None, index: int) -> jax.Array | None:
    """Key of one dropout site, or None when there is no dropout."""
    return None if key is None else jax.random.fold_in(key, index)


class Embeddings(nnx.Module):
    """Word + position + token type (where there are types), LayerNorm, dropout, projection to H (where E != H)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.effective("embedding_size")
        embed = partial(nnx.Embed, features=size, embedding_init=_NORMAL, dtype=dtype, rngs=rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_positions)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size)
        self.norm = _layer_norm(config, rngs, dtype, size)
        if size != config.hidden_size:
            self.project = _linear(size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Ids, all [R, S] int32 -> [R, S, H]."""
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)  # [R, S, E]
        if hasattr(self, "token_type_embeddings"):
            x = x + self.token_type_embeddings(token_type_ids)  # [R, S, E]
        x = dropout(self.norm(x), self.rate, key)  # [R, S, E]
        return self.project(x) if hasattr(self, "project") else x  # [R, S, H]


class SelfAttention(nnx.Module):
    """Multi-head self-attention with an additive bias; the output projection has its dropout, no residual."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        linear = partial(_linear, rngs=rngs, dtype=dtype)
        size = config.hidden_size
        self.query = linear(size, size)
        self.key = linear(size, size)
        self.value = linear(size, size)
        self.output = linear(size, size)
        self.num_heads = config.num_heads
        self.attention_rate = config.attention_dropout
        self.output_rate = config.hidden_dropout if config.attention_output_dropout else 0.0

    def __call__(self, x: jax.Array, bias: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [R, S, H], bias [R, 1, S, S] float32 -> [R, S, H]."""
        rows, length, size = x.shape
        heads = (rows, length, self.num_heads, size // self.num_heads)
        q = self.query(x).reshape(heads)  # [R, S, N, D]
        k = self.key(x).reshape(heads)  # [R, S, N, D]
        v = self.value(x).reshape(heads)  # [R, S, N, D]
        q = q * (heads[-1] ** -0.5)  # [R, S, N, D]: scaling q is cheaper than scaling the scores
        scores = jnp.einsum("rqnd,rknd->rnqk", q, k, preferred_element_type=jnp.float32)  # [R, N, S, S]
        probs = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)  # [R, N, S, S]
        probs = dropout(probs, self.attention_rate, _site(key, 0))
        mixed = jnp.einsum("rnqk,rknd->rqnd", probs, v).reshape(x.shape)  # [R, S, H]
        return dropout(self.output(mixed), self.output_rate, _site(key, 1))  # [R, S, H]


class Layer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.attention_norm = _layer_norm(config, rngs, dtype)
        self.intermediate = _linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.output = _linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.output_norm = _layer_norm(config, rngs, dtype)
        self.act = config.hidden_act
        self.rate = config.hidden_dropout

    def __call__(self, x: jax.Array, bias: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [R, S, H], bias [R, 1, S, S] float32 -> [R, S, H]."""
        x = self.attention_norm(x + self.attention(x, bias, key))  # [R, S, H]
        wide = ACTIVATIONS[self.act](self.intermediate(x))  # [R, S, F]
        return self.output_norm(x + dropout(self.output(wide), self.rate, _site(key, 2)))  # [R, S, H]


class Encoder(nnx.Module):
    """Embeddings and layers; with `remat` a gradient computes each layer again from what entered it."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        _check(config)
        self.remat = remat
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The last of `hidden_states`."""
        return self.hidden_states(input_ids, token_type_ids, position_ids, segment_ids, dropout_key=dropout_key)[-1]

    def hidden_states(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What enters the first layer, then what each layer gives, each [R, S, H] in the compute dtype.

        All inputs are [R, S] int32. A token attends to the tokens of its own segment only; tokens of segment 0
        (padding) attend to padding, so that their numbers are finite and reach nobody.
        Without `dropout_key` the result is deterministic.
        """
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [R, 1, S, S]
        bias = jnp.where(same, 0.0, _MASKED).astype(jnp.float32)  # [R, 1, S, S]
        states = [self.embeddings(input_ids, token_type_ids, position_ids, _site(dropout_key, 0))]  # [R, S, H]
        run = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        for index, layer in enumerate(self.layers):
            states.append(run(layer, states[-1], bias, _site(dropout_key, index + 1)))  # [R, S, H]
        return states


class Pooler(nnx.Module):
    """Dense and activation (BERT's is tanh) over one vector per example."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dense = _linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.act = config.head_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, M, H] -> [R, M, H] float32."""
        return ACTIVATIONS[self.act](self.dense(x))


class Classifier(nnx.Module):
    """Encoder, pooler, dropout, linear head: one row of logits per example.

    `pooling`: "cls" reads the first token (the families' own head), "mean" the mean of the example's tokens.
    """

    def __init__(
        self,
        config: EncoderConfig,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        pooling: str = "cls",
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: one of {', '.join(POOLINGS)}")
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype, remat=remat)
        self.pooler = Pooler(config, rngs=rngs)
        self.head = _linear(config.hidden_size, num_classes, rngs=rngs)
        self.pooling = pooling
        self.rate = config.effective("classifier_dropout")
        self.input_rate = self.rate if config.head_input_dropout else 0.0

    def pooled(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Output of the pooler, [R, M, H] float32; finite in empty slots too."""
        hidden = _encode(self.encoder, batch, _site(dropout_key, 0))  # [R, S, H]
        if self.pooling == "cls":
            vectors = gather_tokens(hidden, batch["cls_index"])  # [R, M, H]
        else:
            vectors = segment_mean(hidden, batch["segment_ids"], batch["cls_index"].shape[1])  # [R, M, H]
        return self.pooler(dropout(vectors, self.input_rate, _site(dropout_key, 2)))  # [R, M, H]

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [R, M, K] float32 of a packed batch: input_ids segment_ids position_ids token_type_ids cls_index."""
        pooled = self.pooled(batch, dropout_key=dropout_key)  # [R, M, H]
        return self.head(dropout(pooled, self.rate, _site(dropout_key, 1)))  # [R, M, K]


class MaskedLM(nnx.Module):
    """BERT's pretraining heads: masked tokens (decoder tied to the word embedding) and next sentence."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.pooler = Pooler(config, rngs=rngs)
        self.transform = _linear(config.hidden_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.transform_norm = _layer_norm(config, rngs, dtype)
        self.decoder_bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))
        self.next_sentence = _linear(config.hidden_size, 2, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Logits of the masked tokens [R, P, V] and of next sentence [R, M, 2], both float32.

        `batch` has the keys of a classifier's batch and `mlm_positions` [R, P] int32 (any position in unused places).
        """
        masked, pooled = self.token_logits_and_pooled(batch, dropout_key=dropout_key)
        return masked, self.next_sentence(pooled)  # [R, P, V], [R, M, 2]

    def token_logits_and_pooled(
        self, batch: Batch, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of the masked tokens [R, P, V] and the pooled first tokens [R, M, H], both float32."""
        hidden = _encode(self.encoder, batch, _site(dropout_key, 0))  # [R, S, H]
        masked = gather_tokens(hidden, batch["mlm_positions"])  # [R, P, H]
        masked = self.transform_norm(ACTIVATIONS[self.act](self.transform(masked)))  # [R, P, H]
        table = self.encoder.embeddings.word_embeddings.embedding[...].astype(masked.dtype)  # [V, H]
        logits = jnp.einsum("rph,vh->rpv", masked, table, preferred_element_type=jnp.float32)  # [R, P, V]
        pooled = self.pooler(gather_tokens(hidden, batch["cls_index"]))  # [R, M, H]
        return logits + self.decoder_bias[...], pooled  # [R, P, V], [R, M, H]


def gather_tokens(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """hidden [R, S, H] at index [R, M] -> [R, M, H]."""
    return jnp.take_along_axis(hidden, index[:, :, None], axis=1)


def segment_mean(hidden: jax.Array, segment_ids: jax.Array, slots: int) -> jax.Array:
    """Mean over each segment's tokens, [R, slots, H] float32; slot m holds segment m + 1; zeros where it is empty."""
    wanted = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
    member = (segment_ids[:, None, :] == wanted[None, :, None]).astype(hidden.dtype)  # [R, M, S]
    total = jnp.einsum("rms,rsh->rmh", member, hidden, preferred_element_type=jnp.float32)  # [R, M, H]
    count = jnp.sum(member, axis=-1, dtype=jnp.float32)[:, :, None]  # [R, M, 1]
    return total / jnp.maximum(count, 1.0)


def _encode(encoder: Encoder, batch: Batch, key: jax.Array | None) -> jax.Array:
    return encoder(
        batch["input_ids"], batch["token_type_ids"], batch["position_ids"], batch["segment_ids"], dropout_key=key
    )


class Linear(nnx.Linear):
    """`nnx.Linear` on one matrix of all tokens, whose gradient XLA's CPU backend computes several times faster."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """[..., in_features] -> [..., out_features]."""
        flat = super().__call__(inputs.reshape(-1, self.in_features), out_sharding)
        return flat.reshape(*inputs.shape[:-1], self.out_features)


def _linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> nnx.Linear:
    return Linear(inputs, outputs, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)


def _layer_norm(config: EncoderConfig, rngs: nnx.Rngs, dtype: DTypeLike, size: int | None = None) -> nnx.LayerNorm:
    # The two-pass variance: E[x²] − E[x]² cancels where a checkpoint has a large mean.
    return nnx.LayerNorm(
        size or config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs
    )


def _check(config: EncoderConfig) -> None:
    if config.hidden_size % config.num_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    for act in (config.hidden_act, config.head_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r}: one of {', '.join(ACTIVATIONS)}")
