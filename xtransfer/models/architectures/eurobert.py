"""EuroBERT: Llama's layers with attention in both directions.

Shapes: R rows, S tokens per row, H hidden size, D the width of a head.

Source: Boizard et al., "EuroBERT: Scaling Multilingual Encoders for European Languages", COLM 2025.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey
from xtransfer.models.encoder import Encoder, EncoderConfig
from xtransfer.models.feed_forward import GatedFeedForward
from xtransfer.models.layers import RMSNorm, embed, look_up, tokens_at
from xtransfer.models.rotary import RotaryContext, rotation
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility


@dataclass(frozen=True)
class EuroBertConfig(EncoderConfig):
    """The settings of EuroBERT that other encoders lack. `layer_norm_eps` is that of RMSNorm.

    Attributes:
      kv_heads: the heads of keys and values; None stands for `num_heads`.
      head_size: the width of a head; None stands for H / `num_heads`.
      rope_theta: the base of the rotary angles.
      attention_bias: whether the projections of attention have biases.
      mlp_bias: whether the feed-forward network has biases.
    """

    architecture: str = "eurobert"
    kv_heads: int | None = None
    head_size: int | None = None
    rope_theta: float = 250_000.0
    attention_bias: bool = False
    mlp_bias: bool = False


class Embeddings(nnx.Module):
    """Word embeddings alone."""

    def __init__(self, config: EuroBertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.word_embeddings = embed(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed input_ids [R, S] int32 -> [R, S, H]."""
        return look_up((self.word_embeddings, input_ids))


class Layer(nnx.Module):
    """Pre-norm transformer layer with RMSNorm, grouped-query attention, and a gated network."""

    def __init__(self, config: EuroBertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention_norm = rms_norm(config, rngs, dtype)
        self.attention = SelfAttention(
            config,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            use_bias=config.attention_bias,
            rngs=rngs,
            dtype=dtype,
        )
        self.feed_forward_norm = rms_norm(config, rngs, dtype)
        self.feed_forward = GatedFeedForward(
            config,
            use_bias=config.mlp_bias,
            output_bias=config.mlp_bias,
            rate=0.0,
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(
        self, x: jax.Array, context: RotaryContext, key: DropoutKey | None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        mixed = self.attention(
            self.attention_norm(x), context.visibility, key, rotation=context.rotation, positions=positions
        )  # [R, Q, H]
        x = tokens_at(x, positions) + mixed  # [R, Q, H]
        return x + self.feed_forward(self.feed_forward_norm(x), None)  # [R, Q, H]


class EuroBertEncoder(Encoder):
    """EuroBERT: pre-norm layers with RMSNorm, and one RMSNorm after the last layer."""

    config_class = EuroBertConfig

    def __init__(self, config: EuroBertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = rms_norm(config, rngs, dtype)
        self.head_size = config.head_size or config.hidden_size // config.num_heads
        self.theta = config.rope_theta

    def context(self, position_ids: jax.Array, segment_ids: jax.Array) -> RotaryContext:
        """Return what all layers read beside their input."""
        return RotaryContext(Visibility.of_segments(segment_ids), rotation(position_ids, self.head_size, self.theta))

    def finish(self, x: jax.Array) -> jax.Array:
        """Normalize the output of the last layer: [R, S, H] -> [R, S, H]."""
        return self.final_norm(x)


def rms_norm(config: EuroBertConfig, rngs: nnx.Rngs, dtype: DTypeLike) -> RMSNorm:
    """Return an RMSNorm over H features."""
    return RMSNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)
