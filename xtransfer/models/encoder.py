"""The BERT encoder, its relatives and their heads as Flax NNX modules.

Shapes: R rows, S tokens a row, M examples a row, P masked positions a row, H hidden size, N heads, D = H / N,
F feed-forward size, E embedding size, V vocabulary, K classes. Parameters are float32; `dtype` is the dtype of the
large matrix products. Softmax, LayerNorm statistics, pooler and logits are float32 whatever `dtype` is.

Sources: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Liu et al., "RoBERTa",
2019; Sanh et al., "DistilBERT", 2019; Clark et al., "ELECTRA", ICLR 2020.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.attention import attend, kept_probabilities, segment_bias
from xtransfer.models.dropout import DropoutKey, dropout
from xtransfer.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear
from xtransfer.runtime.sharding import BATCH_SPEC, LOOKUP_IDS, LOOKUP_PARTS, constrain

Batch = Mapping[str, jax.Array]

POOLINGS = ("cls", "mean")


_INHERITED = {"embedding_size": "hidden_size", "classifier_dropout": "hidden_dropout"}  # what None stands for

_NORMAL = nnx.initializers.normal(0.02)


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


def _site(key: DropoutKey | None, index: int) -> DropoutKey | None:
    """Key of one dropout site, or None when there is no dropout."""
    return None if key is None else key.at(index)


class Embeddings(nnx.Module):
    """Word + position + token type (where there are types), LayerNorm, dropout, projection to H (where E != H)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.effective("embedding_size")
        embed = partial(Embed, features=size, embedding_init=_NORMAL, dtype=dtype, rngs=rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_positions)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size)
        self.norm = _layer_norm(config, rngs, dtype, size)
        if size != config.hidden_size:
            self.project = _linear(size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Ids, all [R, S] int32 -> [R, S, H]."""
        input_ids, position_ids, token_type_ids = (
            constrain(ids, LOOKUP_IDS) for ids in (input_ids, position_ids, token_type_ids)
        )
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)  # [R, S, E]
        if hasattr(self, "token_type_embeddings"):
            x = x + self.token_type_embeddings(token_type_ids)  # [R, S, E]
        x = constrain(x, LOOKUP_PARTS, BATCH_SPEC)  # [R, S, E]
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

    def __call__(self, x: jax.Array, bias: jax.Array, key: DropoutKey | None) -> jax.Array:
        """x [R, S, H], bias [R, 1, S, S] float32 -> [R, S, H]."""
        rows, length, size = x.shape
        heads = (rows, self.num_heads, size // self.num_heads, length)
        q = self.query.to_columns(x).reshape(heads)  # [R, N, D, S]
        k = self.key.to_columns(x).reshape(heads)  # [R, N, D, S]
        v = self.value.to_columns(x).reshape(heads)  # [R, N, D, S]
        q = q * (heads[2] ** -0.5)  # [R, N, D, S]: scaling q is cheaper than scaling the scores
        probabilities = (rows, self.num_heads, length, length)
        keep = kept_probabilities(_site(key, 0), self.attention_rate, probabilities)  # [R, N, S, S]
        mixed = attend(q, k, v, bias, keep, self.attention_rate).reshape(rows, size, length)  # [R, H, S]
        return dropout(self.output.from_columns(mixed), self.output_rate, _site(key, 1))  # [R, S, H]


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

    def __call__(self, x: jax.Array, bias: jax.Array, key: DropoutKey | None) -> jax.Array:
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

    def __call__(self, *inputs: jax.Array, **options: Any) -> jax.Array:
        """The last of `hidden_states`, [R, S, H] in the compute dtype, of the same arguments."""
        return self.hidden_states(*inputs, **options)[-1]

    def hidden_states(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        *,
        dropout_key: DropoutKey | None = None,
        embedded: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What enters the first layer, then what each layer gives, each [R, S, H] in the compute dtype.

        All inputs are [R, S] int32. A token attends to the tokens of its own segment only; tokens of segment 0
        (padding) attend to padding, so that their numbers are finite and reach nobody.
        Without `dropout_key` the result is deterministic. `embedded` [R, S, H] is what `embed` gave, if it was called.
        """
        bias = segment_bias(segment_ids)  # [R, 1, S, S]
        if embedded is None:
            embedded = self.embed(input_ids, token_type_ids, position_ids, dropout_key=dropout_key)
        states = [embedded]  # [R, S, H]
        run = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        for index, layer in enumerate(self.layers):
            states.append(run(layer, states[-1], bias, _site(dropout_key, index + 1)))  # [R, S, H]
        return states

    def embed(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        *,
        dropout_key: DropoutKey | None = None,
    ) -> jax.Array:
        """What enters the first layer, [R, S, H]; inputs as of `hidden_states`."""
        return self.embeddings(input_ids, token_type_ids, position_ids, _site(dropout_key, 0))


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
        key = _dropout_key(batch, dropout_key)
        hidden = _encode(self.encoder, batch, key)  # [R, S, H]
        if self.pooling == "cls":
            vectors = gather_tokens(hidden, batch["cls_index"])  # [R, M, H]
        else:
            vectors = segment_mean(hidden, batch["segment_ids"], batch["cls_index"].shape[1])  # [R, M, H]
        return self.pooler(dropout(vectors, self.input_rate, _site(key, 2)))  # [R, M, H]

    def embed(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """What enters the encoder's first layer, [R, S, H]: taken from a batch that has it as "embedded"."""
        key = _site(_dropout_key(batch, dropout_key), 0)
        ids = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids"))
        return self.encoder.embed(*ids, dropout_key=key)

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [R, M, K] float32 of a packed batch: input_ids segment_ids position_ids token_type_ids cls_index."""
        pooled = self.pooled(batch, dropout_key=dropout_key)  # [R, M, H]
        return self.head(dropout(pooled, self.rate, _site(_dropout_key(batch, dropout_key), 1)))  # [R, M, K]


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
        hidden = _encode(self.encoder, batch, _dropout_key(batch, dropout_key))  # [R, S, H]
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


def _dropout_key(batch: Batch, key: jax.Array | None) -> DropoutKey | None:
    """Rows that are a part of a batch bring their numbers in the whole of it, [R] int32, as "row"."""
    return None if key is None else DropoutKey(key, batch.get("row"))


def _encode(encoder: Encoder, batch: Batch, key: DropoutKey | None) -> jax.Array:
    ids = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids", "segment_ids"))
    return encoder(*ids, dropout_key=_site(key, 0), embedded=batch.get("embedded"))


def _linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> Linear:
    return Linear(inputs, outputs, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)


def _layer_norm(config: EncoderConfig, rngs: nnx.Rngs, dtype: DTypeLike, size: int | None = None) -> LayerNorm:
    return LayerNorm(size or config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


def _check(config: EncoderConfig) -> None:
    if config.hidden_size % config.num_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    for act in (config.hidden_act, config.head_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r}: one of {', '.join(ACTIVATIONS)}")
