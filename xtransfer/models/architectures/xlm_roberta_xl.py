"""XLM-R XL and XXL: pre-norm layers, no LayerNorm in the embeddings, and one after the last layer.

Shapes: R rows, S tokens per row, H hidden size, F feed-forward size.

Source: Goyal et al., "Larger-Scale Transformers for Multilingual Masked Language Modeling", RepL4NLP 2021.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm
from xtransfer.models.layers import ACTIVATIONS, embed, linear, look_up, tokens_at
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility


class Embeddings(nnx.Module):
    """Word, position, and token type embeddings, and dropout."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.word_embeddings = embed(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.position_embeddings = embed(config.max_positions, config.hidden_size, rngs=rngs, dtype=dtype)
        self.token_type_embeddings = embed(config.type_vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed ids, all [R, S] int32 -> [R, S, H]."""
        words, positions = (self.word_embeddings, input_ids), (self.position_embeddings, position_ids)
        return dropout(look_up(words, positions, (self.token_type_embeddings, token_type_ids)), self.rate, key)


class Layer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention_norm = layer_norm(config, rngs, dtype)
        self.attention = SelfAttention(
            config,
            output_rate=config.hidden_dropout,
            rngs=rngs,
            dtype=dtype,
        )
        self.output_norm = layer_norm(config, rngs, dtype)
        self.intermediate = linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.output = linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.act = config.hidden_act

    def __call__(
        self, x: jax.Array, visibility: Visibility, key: DropoutKey | None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        mixed = self.attention(self.attention_norm(x), visibility, key, positions=positions)  # [R, Q, H]
        x = tokens_at(x, positions) + mixed  # [R, Q, H]
        wide = ACTIVATIONS[self.act](self.intermediate(self.output_norm(x)))  # [R, Q, F]
        return x + self.output(wide)  # [R, Q, H]: without dropout, unlike BERT


class XlmRobertaXlEncoder(Encoder):
    """XLM-R XL: pre-norm layers over unnormalized embeddings."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = layer_norm(config, rngs, dtype)

    def finish(self, x: jax.Array) -> jax.Array:
        """Normalize the output of the last layer: [R, S, H] -> [R, S, H]."""
        return self.final_norm(x)
