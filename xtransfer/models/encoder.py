"""The BERT encoder and its relatives as Flax NNX modules; the heads are in `heads`.

Shapes: R rows, S tokens per row, M examples per row, H hidden size, N heads, D = H / N, F feed-forward size,
E embedding size. Parameters are float32. `dtype` is the dtype of the large matrix products; softmax and LayerNorm
statistics are float32 whatever `dtype` is.

Sources: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Liu et al., "RoBERTa",
2019; Sanh et al., "DistilBERT", 2019; Clark et al., "ELECTRA", ICLR 2020.
"""

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
from xtransfer.runtime.sharding import BATCH_SPEC, LOOKUP_COLUMNS, LOOKUP_IDS, constrain

_NORMAL = nnx.initializers.normal(0.02)


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of an encoder and its classification head, as its checkpoint states it; the defaults are BERT's.

    Attributes:
      type_vocab_size: the number of token types, 0 if the encoder has none.
      classifier_dropout: the rate before the head; None stands for `hidden_dropout`.
      position_offset: the position id of an example's first token.
      embedding_size: the width of the embedding tables; None stands for `hidden_size`. Other widths are projected.
      attention_output_dropout: whether a layer applies dropout between its attention and the residual.
      head_act: the activation of the pooler.
      masked_lm_act: the activation of the masked language model's head; None stands for `hidden_act`.
      head_input_dropout: whether the head applies dropout to its input too.
      family: the name of the weight table, a key of `models.hf.families.FAMILIES`.
      architecture: the encoder's module, a key of `models.heads.ARCHITECTURES`.
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
    masked_lm_act: str | None = None
    head_input_dropout: bool = False
    family: str = "bert"
    architecture: str = "bert"

    @property
    def embedding_width(self) -> int:
        """E: `embedding_size`, or the hidden size if that is None."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def masked_lm_activation(self) -> str:
        """The activation of the masked language model's head: `masked_lm_act`, or `hidden_act` if that is None."""
        return self.hidden_act if self.masked_lm_act is None else self.masked_lm_act

    @property
    def classifier_rate(self) -> float:
        """The dropout rate before the head: `classifier_dropout`, or the hidden dropout if that is None."""
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout


def at_site(key: DropoutKey | None, site: int) -> DropoutKey | None:
    """Return the key for one of several sites that draw dropout masks, or None without dropout."""
    return None if key is None else key.at(site)


class Embeddings(nnx.Module):
    """Word, position, and token type embeddings (if there are types), LayerNorm, dropout, and projection if E != H."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.embedding_width
        embed = partial(Embed, features=size, embedding_init=_NORMAL, dtype=dtype, rngs=rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_positions)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size)
        self.norm = layer_norm(config, rngs, dtype, size)
        if size != config.hidden_size:
            self.project = linear(size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed ids, all [R, S] int32 -> [R, S, H]."""
        input_ids, position_ids, token_type_ids = (
            constrain(ids, LOOKUP_IDS) for ids in (input_ids, position_ids, token_type_ids)
        )
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)  # [R, S, E]
        if hasattr(self, "token_type_embeddings"):
            x = x + self.token_type_embeddings(token_type_ids)  # [R, S, E]
        x = constrain(x, LOOKUP_COLUMNS, BATCH_SPEC)  # [R, S, E]
        x = dropout(self.norm(x), self.rate, key)  # [R, S, E]
        return self.project(x) if hasattr(self, "project") else x  # [R, S, H]


class SelfAttention(nnx.Module):
    """Multi-head self-attention with an additive bias, an output projection, and dropout; without the residual."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.hidden_size
        self.query = linear(size, size, rngs=rngs, dtype=dtype)
        self.key = linear(size, size, rngs=rngs, dtype=dtype)
        self.value = linear(size, size, rngs=rngs, dtype=dtype)
        self.output = linear(size, size, rngs=rngs, dtype=dtype)
        self.num_heads = config.num_heads
        self.attention_rate = config.attention_dropout
        self.output_rate = config.hidden_dropout if config.attention_output_dropout else 0.0

    def __call__(self, x: jax.Array, bias: jax.Array, key: DropoutKey | None) -> jax.Array:
        """Mix the tokens of each segment: x [R, S, H], bias [R, 1, S, S] float32 -> [R, S, H]."""
        rows, length, size = x.shape
        width = size // self.num_heads
        head_shape = (rows, self.num_heads, width, length)
        q = self.query.to_columns(x).reshape(head_shape)  # [R, N, D, S]
        k = self.key.to_columns(x).reshape(head_shape)  # [R, N, D, S]
        v = self.value.to_columns(x).reshape(head_shape)  # [R, N, D, S]
        q = q * (width**-0.5)  # [R, N, D, S]: scaling q is cheaper than scaling the scores
        mask_shape = (rows, self.num_heads, length, length)
        keep = kept_probabilities(at_site(key, 0), self.attention_rate, mask_shape)  # [R, N, S, S]
        mixed = attend(q, k, v, bias, keep, self.attention_rate).reshape(rows, size, length)  # [R, H, S]
        return dropout(self.output.from_columns(mixed), self.output_rate, at_site(key, 1))  # [R, S, H]


class Layer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention = SelfAttention(config, rngs=rngs, dtype=dtype)
        self.attention_norm = layer_norm(config, rngs, dtype)
        self.intermediate = linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.output = linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.output_norm = layer_norm(config, rngs, dtype)
        self.act = config.hidden_act
        self.rate = config.hidden_dropout

    def __call__(self, x: jax.Array, bias: jax.Array, key: DropoutKey | None) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H], bias [R, 1, S, S] float32 -> [R, S, H]."""
        x = self.attention_norm(x + self.attention(x, bias, key))  # [R, S, H]
        wide = ACTIVATIONS[self.act](self.intermediate(x))  # [R, S, F]
        return self.output_norm(x + dropout(self.output(wide), self.rate, at_site(key, 2)))  # [R, S, H]


class Encoder(nnx.Module):
    """Embeddings and layers. With `remat`, the backward pass computes each layer again from its input."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        _check(config)
        self.remat = remat
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])

    def __call__(self, *inputs: jax.Array, **options: Any) -> jax.Array:
        """Return the last of `hidden_states`, [R, S, H] in the compute dtype; takes the same arguments."""
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
        """Return the input of the first layer and the output of every layer, each [R, S, H] in the compute dtype.

        A token attends to the tokens of its own segment only. Tokens of segment 0, which is padding, attend to padding:
        their values are finite, and no other token sees them.

        Args:
          input_ids, token_type_ids, position_ids, segment_ids: [R, S] int32.
          dropout_key: the key of all masks; None turns dropout off.
          embedded: [R, S, H], the output of `embed`, if it was called before.
        """
        bias = segment_bias(segment_ids)  # [R, 1, S, S]
        if embedded is None:
            embedded = self.embed(input_ids, token_type_ids, position_ids, dropout_key=dropout_key)
        states = [embedded]  # [R, S, H]
        run = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        for index, layer in enumerate(self.layers):
            states.append(run(layer, states[-1], bias, at_site(dropout_key, index + 1)))  # [R, S, H]
        return states

    def embed(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        position_ids: jax.Array,
        *,
        dropout_key: DropoutKey | None = None,
    ) -> jax.Array:
        """Return the input of the first layer, [R, S, H]; see `hidden_states` for the arguments."""
        return self.embeddings(input_ids, token_type_ids, position_ids, at_site(dropout_key, 0))


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> Linear:
    """Return a linear layer with BERT's initialization."""
    return Linear(inputs, outputs, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)


def layer_norm(config: EncoderConfig, rngs: nnx.Rngs, dtype: DTypeLike, size: int | None = None) -> LayerNorm:
    """Return a LayerNorm over `size` features, by default H."""
    return LayerNorm(size or config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


def _check(config: EncoderConfig) -> None:
    if config.hidden_size % config.num_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    for act in (config.hidden_act, config.head_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r}: one of {', '.join(ACTIVATIONS)}")
