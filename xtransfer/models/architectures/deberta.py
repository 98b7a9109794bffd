"""DeBERTa v2 and v3: scores that also depend on how far apart two tokens are.

A score is the sum of three products: of a query and a key, of a query and the vector of the distance ("content to
position", c2p), and of a key and the vector of the distance ("position to content", p2c). It depends on distances only,
so a text has the same vectors wherever it stands in a packed row.

All S × S scores of a row are computed at once, so memory is quadratic in the length of a row. The published models were
trained on 512 tokens.

Shapes: R rows, S tokens per row, H hidden size, N heads, D the width of a head, F feed-forward size, E embedding size,
A the number of distances in each direction that have vectors of their own.

Sources: He et al., "DeBERTa: Decoding-Enhanced BERT with Disentangled Attention", ICLR 2021; He et al., "DeBERTaV3",
ICLR 2023.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm, may_be_zero
from xtransfer.models.layers import ACTIVATIONS, NORMAL, Embed, embed, linear, look_up, tokens_at
from xtransfer.models.self_attention import SelfAttention
from xtransfer.models.visibility import Visibility

CONTENT_TO_POSITION, POSITION_TO_CONTENT = "c2p", "p2c"


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The settings of DeBERTa that other encoders lack.

    Attributes:
      max_distance: the largest distance, in tokens, that differs from larger ones.
      buckets: the number of distances in each direction that have vectors of their own, of which the larger half are
        ranges that grow exponentially up to `max_distance`; 0 gives every distance a vector.
      score_terms: the products beside that of queries and keys: `CONTENT_TO_POSITION`, `POSITION_TO_CONTENT`, or both.
      shares_projections: whether the vectors of distances are projected like queries and keys, or separately.
      normalizes_distances: whether a LayerNorm is applied to the vectors of distances.
      adds_positions: whether the embeddings also have absolute positions.
      convolution_size: the width of the convolution beside the first layer, in tokens; 0 is none.
      convolution_groups: the groups of channels of that convolution.
      convolution_act: its activation.
      pooler_dropout: the dropout rate before the pooler.
    """

    architecture: str = "deberta"
    type_vocab_size: int = may_be_zero(0)
    max_distance: int = 512
    buckets: int = may_be_zero(0)
    score_terms: tuple[str, ...] = (CONTENT_TO_POSITION, POSITION_TO_CONTENT)
    shares_projections: bool = False
    normalizes_distances: bool = False
    adds_positions: bool = True
    convolution_size: int = may_be_zero(0)
    convolution_groups: int = 1
    convolution_act: str = "tanh"
    pooler_dropout: float = 0.0

    @property
    def distances(self) -> int:
        """A: the number of distances in each direction that have vectors of their own."""
        return self.buckets or self.max_distance

    @property
    def head_input_rate(self) -> float:
        """The dropout rate before the pooler."""
        return self.pooler_dropout

    def multiplies_every_token(self, module: str, *, at_positions: bool) -> bool:
        """Return whether the matrix of a layer's module multiplies every token of a batch; see `EncoderConfig`."""
        if module in ("attention.position_key", "attention.position_query"):
            return False  # they multiply the vectors of distances
        reads_all_tokens = self.convolution_size > 0 and self.num_layers == 1  # the only layer has the convolution
        return not at_positions or module.startswith("attention.") or reads_all_tokens


class Context(NamedTuple):
    """What the layers read beside their input.

    Attributes:
      visibility: who sees whom.
      distances: [2 · A, H], the vectors of distances.
    """

    visibility: Visibility
    distances: jax.Array


class Embeddings(nnx.Module):
    """Word embeddings, with positions and token types if there are any, projection if E != H, LayerNorm, dropout."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.embedding_width
        self.word_embeddings = embed(config.vocab_size, size, rngs=rngs, dtype=dtype)
        if config.adds_positions:
            self.position_embeddings = embed(config.max_positions, size, rngs=rngs, dtype=dtype)
        if config.type_vocab_size:
            self.token_type_embeddings = embed(config.type_vocab_size, size, rngs=rngs, dtype=dtype)
        if size != config.hidden_size:
            self.project = linear(size, config.hidden_size, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = layer_norm(config, rngs, dtype)
        self.rate = config.hidden_dropout

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, key: DropoutKey | None
    ) -> jax.Array:
        """Embed ids, all [R, S] int32 -> [R, S, H]."""
        tables = [(self.word_embeddings, input_ids)]
        if hasattr(self, "position_embeddings"):
            tables.append((self.position_embeddings, position_ids))
        if hasattr(self, "token_type_embeddings"):
            tables.append((self.token_type_embeddings, token_type_ids))
        x = look_up(*tables)  # [R, S, E]
        x = self.project(x) if hasattr(self, "project") else x  # [R, S, H]
        return dropout(self.norm(x), self.rate, key)  # [R, S, H]


class DisentangledAttention(SelfAttention):
    """Self-attention whose scores have the terms of `DebertaConfig.score_terms`."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        super().__init__(
            config,
            output_rate=config.hidden_dropout,
            rngs=rngs,
            dtype=dtype,
        )
        self.terms = config.score_terms
        self.buckets, self.max_distance, self.num_distances = config.buckets, config.max_distance, config.distances
        self.distance_rate = config.hidden_dropout
        if not config.shares_projections:
            size = config.hidden_size
            if CONTENT_TO_POSITION in self.terms:
                self.position_key = linear(size, size, rngs=rngs, dtype=dtype)
            if POSITION_TO_CONTENT in self.terms:
                self.position_query = linear(size, size, rngs=rngs, dtype=dtype)

    def attend_to(self, x: jax.Array, context: Context, key: DropoutKey | None) -> jax.Array:
        """Mix the tokens of each segment: x [R, S, H] -> [R, S, H]."""
        q, k, v = self.project(x)  # [R, N, D, S]
        scale = (self.head_size * (1 + len(self.terms))) ** -0.5
        table_key = None if key is None else DropoutKey(key.key).at(3)  # the table has no rows of the batch
        table = dropout(context.distances, self.distance_rate, table_key)  # [2 · A, H]
        relative = self.relative_scores(q * scale, k * scale, table) if self.terms else None  # [R, N, S, S]
        return self.mix(q * scale, k, v, context.visibility, key, relative)  # [R, S, H]

    def relative_scores(self, q: jax.Array, k: jax.Array, table: jax.Array) -> jax.Array:
        """Return c2p and p2c: q and k [R, N, D, S], scaled, table [2 · A, H] -> [R, N, S (keys), S (queries)]."""
        length = q.shape[-1]
        rows = buckets_of(length, self.buckets, self.max_distance) + self.num_distances  # [2 · S − 1]
        vectors = jnp.take(table, np.clip(rows, 0, 2 * self.num_distances - 1), axis=0)  # [2 · S − 1, H]
        scores = jnp.zeros((), q.dtype)
        if CONTENT_TO_POSITION in self.terms:
            keys = self._heads(getattr(self, "position_key", self.key)(vectors))  # [2 · S − 1, N, D]
            by_distance = jnp.einsum("rnds,pnd->rnsp", q, keys)  # [R, N, S (queries), 2 · S − 1]
            scores = scores + jnp.swapaxes(shifted(by_distance[..., ::-1]), 2, 3)  # [R, N, S, S]
        if POSITION_TO_CONTENT in self.terms:
            queries = self._heads(getattr(self, "position_query", self.query)(vectors))  # [2 · S − 1, N, D]
            by_distance = jnp.einsum("rnds,pnd->rnsp", k, queries)  # [R, N, S (keys), 2 · S − 1]
            scores = scores + shifted(by_distance)  # [R, N, S, S]
        return scores

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), self.num_heads, self.head_size)


def buckets_of(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance from 1 − length to length − 1, [2 · length − 1] int64, of either sign.

    Distances up to half of `buckets` are their own buckets, and larger ones are numbered by their logarithm. The
    arithmetic is float32, as in the reference, so that the edges of the buckets are the same.
    """
    distance = np.arange(1 - length, length)
    if not buckets:
        return distance
    half = buckets // 2
    far = np.maximum(np.abs(distance), half).astype(np.float32) / np.float32(half)
    steps = np.log(far) / np.log(np.float32((max_distance - 1) / half)) * np.float32(half - 1)
    return np.where(np.abs(distance) <= half, distance, (np.sign(distance) * (np.ceil(steps) + half)).astype(np.int64))


def shifted(x: jax.Array) -> jax.Array:
    """Return y[..., i, j] = x[..., i, S − 1 − i + j]: [..., S, 2 · S − 1] -> [..., S, S], without a gather.

    Read as one line, row i of y begins S − 1 numbers after i rows of 2 · S − 2.
    """
    *leading, length, width = x.shape
    line = x.reshape(*leading, length * width)[..., length - 1 : length - 1 + length * (width - 1)]
    return line.reshape(*leading, length, width - 1)[..., :length] if length > 1 else x


class Convolution(nnx.Module):
    """A convolution over the tokens of a segment, added to the output of the first layer, and LayerNorm."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size, groups = config.hidden_size, config.convolution_groups
        shape = (config.convolution_size, size // groups, size)
        self.kernel = nnx.Param(NORMAL(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))
        self.norm = layer_norm(config, rngs, dtype)
        self.groups, self.act, self.rate, self.dtype = groups, config.convolution_act, config.hidden_dropout, dtype

    def __call__(self, x: jax.Array, added: jax.Array, segment_ids: jax.Array, key: DropoutKey | None) -> jax.Array:
        """Convolve x [R, S, H], add `added` [R, S, H], and normalize -> [R, S, H]; tokens see their segment only."""
        rows, length, size = x.shape
        kernel = self.kernel[...].astype(self.dtype)  # [width, H / groups, H]
        width, inputs, _ = kernel.shape
        total = jnp.broadcast_to(self.bias[...].astype(self.dtype), x.shape)  # [R, S, H]
        before = (width - 1) // 2
        padding = ((0, 0), (before, width - 1 - before))
        tokens = jnp.pad(x, (*padding, (0, 0)))  # [R, S + width − 1, H]
        segments = jnp.pad(segment_ids, padding, constant_values=-1)  # [R, S + width − 1]
        for step in range(width):
            same = segments[:, step : step + length] == segment_ids  # [R, S]
            moved = jnp.where(same[..., None], tokens[:, step : step + length], 0)  # [R, S, H]
            grouped = moved.reshape(rows, length, self.groups, inputs)
            part = kernel[step].reshape(inputs, self.groups, size // self.groups)
            total = total + jnp.einsum("rsgi,igo->rsgo", grouped, part).reshape(rows, length, size)
        return self.norm(added + ACTIVATIONS[self.act](dropout(total, self.rate, key)))  # [R, S, H]


class Layer(nnx.Module):
    """Post-norm transformer layer with disentangled attention; the first one may have a convolution beside it."""

    def __init__(self, config: DebertaConfig, index: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.attention = DisentangledAttention(config, rngs=rngs, dtype=dtype)
        self.attention_norm = layer_norm(config, rngs, dtype)
        self.intermediate = linear(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.output = linear(config.intermediate_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.output_norm = layer_norm(config, rngs, dtype)
        if index == 0 and config.convolution_size:
            self.convolution = Convolution(config, rngs=rngs, dtype=dtype)
        self.act, self.rate = config.hidden_act, config.hidden_dropout

    def __call__(
        self, x: jax.Array, context: Context, key: DropoutKey | None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Apply attention and the feed-forward network: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q]."""
        mixed = self.attention_norm(x + self.attention.attend_to(x, context, key))  # [R, S, H]
        if not hasattr(self, "convolution"):  # which reads all tokens
            mixed, positions = tokens_at(mixed, positions), None  # [R, Q, H]
        wide = ACTIVATIONS[self.act](self.intermediate(mixed))  # [R, Q, F]
        y = self.output_norm(mixed + dropout(self.output(wide), self.rate, at_site(key, 2)))  # [R, Q, H]
        if hasattr(self, "convolution"):
            y = self.convolution(x, y, context.visibility.segment_ids, at_site(key, 4))  # [R, S, H]
        return tokens_at(y, positions)


class DebertaEncoder(Encoder):
    """DeBERTa: one table of distances, which all layers read."""

    config_class = DebertaConfig

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: bool = False):
        super().__init__(config, remat=remat)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.relative_embeddings: Embed = embed(2 * config.distances, config.hidden_size, rngs=rngs, dtype=dtype)
        if config.normalizes_distances:
            self.relative_norm = layer_norm(config, rngs, dtype)
        self.layers = nnx.List([Layer(config, index, rngs=rngs, dtype=dtype) for index in range(config.num_layers)])
        self.dtype = dtype

    def context(self, position_ids: jax.Array, segment_ids: jax.Array) -> Context:
        """Return what all layers read beside their input."""
        table = self.relative_embeddings.embedding[...].astype(self.dtype)  # [2 · A, H]
        if hasattr(self, "relative_norm"):
            table = self.relative_norm(table)
        return Context(Visibility.of_segments(segment_ids, at_once=True), table)
