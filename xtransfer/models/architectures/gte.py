"""Multilingual GTE: BERT's post-norm layers with rotary positions and gated networks.

Shapes: R rows, S tokens per row, H hidden size, D the width of a head.

Source: Zhang et al., "mGTE: Generalized Long-Context Text Representation and Reranking Models", EMNLP 2024.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm, may_be_zero
from xtransfer.models.feed_forward import GatedFeedForward
from xtransfer.models.layers import embed, look_up, tokens_at
from xtransfer.models.rotary import RotaryContext, rotation
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility


@dataclass(frozen=True)
class GteConfig(EncoderConfig):
    """The settings of GTE that other encoders lack.

    Attributes:
      rope_theta: the base of the rotary angles.
      rope_divisor: the divisor of the rotary angles.
    """

    architecture: str = "gte"
    type_vocab_size: int = may_be_zero(1)
    rope_theta: float = 160_000.0
    rope_divisor: float = 1.0


class Embeddings(nnx.Module):
    """Word and token type embeddings (if there are types), LayerNorm, and dropout."""

    def __init__(self, config: GteConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.word_embeddings = embed(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(config, rngs, dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed input_ids and token_type_ids, both [R, S] int32 -> [R, S, H]."""
        tables = [(self.word_embeddings, input_ids)]
        if hasattr(self, "token_type_embeddings"):
            tables.append((self.token_type_embeddings, token_type_ids))
        return dropout(self.norm(look_up(*tables)), self.rate, key)  # [R, S, H]


class Layer(nnx.Module):
    """Post-norm transformer layer with rotary attention and a gated network."""

    def __init__(self, config: GteConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention = SelfAttention(
            config,
            output_rate=config.hidden_dropout,
            rngs=rngs,
            dtype=dtype,
        )
        self.attention_norm = layer_norm(config, rngs, dtype)
        self.feed_forward = GatedFeedForward(
            config,
            use_bias=False,
            output_bias=True,
            rate=config.hidden_dropout,
            rngs=rngs,
            dtype=dtype,
        )
        self.output_norm = layer_norm(config, rngs, dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, x: jax.Array, context: RotaryContext, key: DropoutKey | None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        mixed = self.attention(x, context.visibility, key, rotation=context.rotation, positions=positions)  # [R, Q, H]
        x = self.attention_norm(tokens_at(x, positions) + mixed)  # [R, Q, H]
        wide = self.feed_forward(x, at_site(key, 2))  # [R, Q, H]
        return self.output_norm(x + dropout(wide, self.rate, at_site(key, 3)))  # [R, Q, H]


class GteEncoder(Encoder):
    """GTE: a LayerNorm after every residual, as in BERT, and no position embeddings."""

    config_class = GteConfig

    def __init__(self, config: GteConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.head_size = config.hidden_size // config.num_heads
        self.theta, self.divisor = config.rope_theta, config.rope_divisor

    def context(self, position_ids: jax.Array, segment_ids: jax.Array) -> RotaryContext:
        """Return what all layers read beside their input."""
        turn = rotation(position_ids, self.head_size, self.theta, divisor=self.divisor)
        return RotaryContext(Visibility.of_segments(segment_ids), turn)
