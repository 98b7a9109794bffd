"""BERT and its closest relatives: RoBERTa, XLM-R, CamemBERT, DistilBERT, and ELECTRA.

Shapes: R rows, S tokens per row, H hidden size, F feed-forward size, E embedding size.

Sources: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Liu et al., "RoBERTa",
2019; Sanh et al., "DistilBERT", 2019; Clark et al., "ELECTRA", ICLR 2020.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm
from xtransfer.models.layers import ACTIVATIONS, embed, linear, look_up, tokens_at
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility


class Embeddings(nnx.Module):
    """Word, position, and token type embeddings (if there are types), LayerNorm, dropout, and projection if E != H."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.embedding_width
        self.word_embeddings = embed(config.vocab_size, size, rngs=rngs, dtype=dtype)
        self.position_embeddings = embed(config.max_positions, size, rngs=rngs, dtype=dtype)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size, size, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(config, rngs, dtype, size)
        if size != config.hidden_size:
            self.project = linear(size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed ids, all [R, S] int32 -> [R, S, H]."""
        tables = [(self.word_embeddings, input_ids), (self.position_embeddings, position_ids)]
        if hasattr(self, "token_type_embeddings"):
            tables.append((self.token_type_embeddings, token_type_ids))
        x = dropout(self.norm(look_up(*tables)), self.rate, key)  # [R, S, E]
        return self.project(x) if hasattr(self, "project") else x  # [R, S, H]


class Layer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention = SelfAttention(
            config,
            output_rate=config.hidden_dropout if config.attention_output_dropout else 0.0,
            rngs=rngs,
            dtype=dtype,
        )
        self.attention_norm = layer_norm(config, rngs, dtype)
        self.intermediate = linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.output = linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.output_norm = layer_norm(config, rngs, dtype)
        self.act, self.rate = config.hidden_act, config.hidden_dropout

    def __call__(
        self, x: jax.Array, visibility: Visibility, key: DropoutKey | None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        mixed = self.attention(x, visibility, key, positions=positions)  # [R, Q, H]
        x = self.attention_norm(tokens_at(x, positions) + mixed)  # [R, Q, H]
        wide = ACTIVATIONS[self.act](self.intermediate(x))  # [R, Q, F]
        return self.output_norm(x + dropout(self.output(wide), self.rate, at_site(key, 2)))  # [R, Q, H]


class BertEncoder(Encoder):
    """BERT: absolute positions, and a LayerNorm after every residual."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
