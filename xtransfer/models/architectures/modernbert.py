"""ModernBERT, Ettin, and mmBERT: pre-norm layers, rotary positions, gated networks, and mostly local attention.

Shapes: R rows, S tokens per row, H hidden size, F feed-forward size, D the width of a head.

Source: Warner et al., "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", ACL 2025.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm
from xtransfer.models.feed_forward import GatedFeedForward
from xtransfer.models.layers import embed, look_up, tokens_at
from xtransfer.models.rotary import RotaryContext, rotation
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility

GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """The settings of ModernBERT that other encoders lack. `hidden_dropout` is the rate in the feed-forward network.

    Attributes:
      layer_types: the kind of each layer, `GLOBAL` or `LOCAL`.
      window: the tokens that a local layer's token sees, half of them on each side.
      rope_theta: the base of the rotary angles in global layers.
      local_rope_theta: the same in local layers.
      embedding_dropout: the dropout rate of the embeddings.
      attention_bias: whether the projections of attention have biases.
      mlp_bias: whether the feed-forward network has biases.
      head_bias: whether the dense layer of the head has a bias.
    """

    architecture: str = "modernbert"
    layer_types: tuple[str, ...] = ()
    window: int = 128
    rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    embedding_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    def with_dropout(self, rate: float) -> Self:
        """Return these settings with one dropout rate at all sites of the encoder."""
        return replace(super().with_dropout(rate), embedding_dropout=rate)

    @property
    def pooler_bias(self) -> bool:
        """Whether the dense layer of the pooler has a bias."""
        return self.head_bias

    @property
    def pooler_norm(self) -> bool:
        """Whether a LayerNorm follows the activation of the pooler."""
        return True

    @property
    def predicts_with_pooler(self) -> bool:
        """Whether the masked language model's head is the pooler: the classifier starts from the pretrained one."""
        return True


class Embeddings(nnx.Module):
    """Word embeddings, LayerNorm, and dropout."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.word_embeddings = embed(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(config, rngs, dtype)
        self.rate = config.embedding_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed input_ids [R, S] int32 -> [R, S, H]."""
        return dropout(self.norm(look_up((self.word_embeddings, input_ids))), self.rate, key)


class Layer(nnx.Module):
    """Pre-norm transformer layer, global or local. The first one does not normalize the embeddings again."""

    def __init__(self, config: ModernBertConfig, index: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.kind = config.layer_types[index]
        if index:
            self.attention_norm = layer_norm(config, rngs, dtype)
        self.attention = SelfAttention(
            config,
            use_bias=config.attention_bias,
            output_rate=config.attention_dropout,
            rngs=rngs,
            dtype=dtype,
        )
        self.feed_forward_norm = layer_norm(config, rngs, dtype)
        self.feed_forward = GatedFeedForward(
            config,
            use_bias=config.mlp_bias,
            output_bias=config.mlp_bias,
            rate=config.hidden_dropout,
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(
        self,
        x: jax.Array,
        context: dict[str, RotaryContext],
        key: DropoutKey | None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        visibility, turn = context[self.kind]
        normal = self.attention_norm(x) if hasattr(self, "attention_norm") else x  # [R, S, H]
        mixed = self.attention(normal, visibility, key, rotation=turn, positions=positions)  # [R, Q, H]
        x = tokens_at(x, positions) + mixed  # [R, Q, H]
        return x + self.feed_forward(self.feed_forward_norm(x), at_site(key, 2))  # [R, Q, H]


class ModernBertEncoder(Encoder):
    """ModernBERT: every few layers attend to all tokens of a text, and the others to a window."""

    config_class = ModernBertConfig

    def __init__(
        self, config: ModernBertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False
    ):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, index, rngs=rngs, dtype=dtype) for index in range(config.num_layers)])
        self.final_norm = layer_norm(config, rngs, dtype)
        self.head_size = config.hidden_size // config.num_heads
        self.distance = config.window // 2
        self.theta, self.local_theta = config.rope_theta, config.local_rope_theta

    def context(self, position_ids: jax.Array, segment_ids: jax.Array) -> dict[str, RotaryContext]:
        """Return what each kind of layer reads beside its input."""
        kinds = ((GLOBAL, None, self.theta), (LOCAL, self.distance, self.local_theta))
        return {
            kind: RotaryContext(
                Visibility.of_segments(segment_ids, window), rotation(position_ids, self.head_size, theta)
            )
            for kind, window, theta in kinds
        }

    def finish(self, x: jax.Array) -> jax.Array:
        """Normalize the output of the last layer: [R, S, H] -> [R, S, H]."""
        return self.final_norm(x)
