"""The heads of an encoder: the classifier, and the head of a masked language model.

Shapes: R rows, S tokens per row, M examples per row, P masked positions per row, H hidden size, V vocabulary size,
E embedding size, K classes. Pooler and logits are float32 whatever the compute dtype is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import Encoder, EncoderConfig, layer_norm
from xtransfer.models.layers import ACTIVATIONS, linear, tokens_at

Batch = Mapping[str, jax.Array]
"""A packed batch on the device. The model reads these keys:

  input_ids, segment_ids, position_ids, token_type_ids: [R, S] int32. Segment 0 is padding.
  cls_index: [R, M] int32, the position of each example's first token.
  mlm_positions: [R, P] int32, the masked positions; only for pretraining.
  row_index: [R] int32, optional: the row numbers in the global batch, if these rows are one microbatch of it. Dropout
    masks depend on them, so that microbatches have the masks of the global batch.
  embedded: [R, S, H] in the compute dtype, optional: the output of `Classifier.embed` for these rows, if it was
    computed before.
"""

POOLINGS = ("cls", "mean", "late")


class Pooler(nnx.Module):
    """A dense layer, an activation (BERT's is tanh), and ModernBERT's LayerNorm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        size = config.hidden_size
        self.dense = linear(size, size, use_bias=config.pooler_bias, rngs=rngs, dtype=dtype)
        if config.pooler_norm:
            self.norm = layer_norm(config, rngs, dtype)
        self.act = config.head_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform vectors: [..., H] -> [..., H] in the compute dtype, by default float32."""
        x = ACTIVATIONS[self.act](self.dense(x))
        return self.norm(x) if hasattr(self, "norm") else x


class Classifier(nnx.Module):
    """Encoder, pooler, dropout, and a linear head: one row of logits per example.

    Args:
      config: the encoder's architecture.
      num_classes: K.
      rngs: initializes the parameters.
      pooling: "cls" reads an example's first token, as most families' own heads do; "mean" the mean of its tokens.
        "late" takes the mean after the pooler, which equals the mean of the tokens' logits, as EuroBERT does.
      dtype: the compute dtype.
      remat: compute each layer again in the backward pass, which saves memory.
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
        self.encoder = ARCHITECTURES[config.architecture](config, rngs=rngs, dtype=dtype, remat=remat)
        self.pooler = Pooler(config, rngs=rngs)
        self.head = linear(config.hidden_size, num_classes, rngs=rngs)
        self.pooling = pooling
        self.rate = config.classifier_rate
        self.input_rate = config.head_input_rate

    def pooled(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the output of the pooler, [R, M, H] float32, which is finite in empty slots too."""
        key = _dropout_key(batch, dropout_key)
        segment_ids, slots = batch["segment_ids"], batch["cls_index"].shape[1]
        if self.pooling == "cls":
            vectors = _encode(self.encoder, batch, key, batch["cls_index"])  # [R, M, H]
        else:
            vectors = _encode(self.encoder, batch, key)  # [R, S, H]
        if self.pooling == "mean":
            vectors = segment_mean(vectors, segment_ids, slots)  # [R, M, H]
        vectors = self.pooler(dropout(vectors, self.input_rate, at_site(key, 2)))  # [R, M, H], or [R, S, H] if "late"
        return segment_mean(vectors, segment_ids, slots) if self.pooling == "late" else vectors  # [R, M, H]

    def embed(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the input of the encoder's first layer, [R, S, H], for a batch's key `embedded`."""
        key = at_site(_dropout_key(batch, dropout_key), 0)
        ids = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids"))
        return self.encoder.embed(*ids, dropout_key=key)

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the logits of a packed batch, [R, M, K] float32."""
        pooled = self.pooled(batch, dropout_key=dropout_key)  # [R, M, H]
        return self.head(dropout(pooled, self.rate, at_site(_dropout_key(batch, dropout_key), 1)))  # [R, M, K]


class MaskedLM(nnx.Module):
    """An encoder with a masked language model's head, whose decoder is tied to the word embeddings.

    Args:
      config: the encoder's architecture.
      rngs: initializes the parameters.
      dtype: the compute dtype.
      with_pooler: keep a pooler, which masked language modelling does not train.
      with_next_sentence: also keep BERT's next-sentence head, which reads the pooler.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        with_pooler: bool = False,
        with_next_sentence: bool = False,
    ):
        width = config.embedding_width
        self.encoder = ARCHITECTURES[config.architecture](config, rngs=rngs, dtype=dtype)
        if config.predicts_with_pooler:
            self.pooler = Pooler(config, rngs=rngs, dtype=dtype)
        else:
            self.transform = linear(config.hidden_size, width, rngs=rngs, dtype=dtype)
            self.transform_norm = layer_norm(config, rngs, dtype, width)
        self.predicts_with_pooler = config.predicts_with_pooler
        self.decoder_bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))
        self.act = config.masked_lm_activation
        if (with_pooler or with_next_sentence) and not config.predicts_with_pooler:
            self.pooler = Pooler(config, rngs=rngs)
        if with_next_sentence:
            self.next_sentence = linear(config.hidden_size, 2, rngs=rngs)

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the logits of the masked tokens, [R, P, V] float32.

        Unused entries of `mlm_positions` may hold any position.
        """
        return self.token_logits(self.encode(batch, dropout_key=dropout_key), batch)  # [R, P, V]

    def encode(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the output of the encoder, [R, S, H]."""
        return _encode(self.encoder, batch, _dropout_key(batch, dropout_key))  # [R, S, H]

    def token_logits(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """Decode the masked tokens of an encoded batch: hidden [R, S, H] -> [R, P, V] float32."""
        masked = tokens_at(hidden, batch["mlm_positions"])  # [R, P, H]
        if self.predicts_with_pooler:
            masked = self.pooler(masked)  # [R, P, E]
        else:
            masked = self.transform_norm(ACTIVATIONS[self.act](self.transform(masked)))  # [R, P, E]
        table = self.encoder.embeddings.word_embeddings.embedding[...].astype(masked.dtype)  # [V, E]
        logits = jnp.einsum("rpe,ve->rpv", masked, table, preferred_element_type=jnp.float32)  # [R, P, V]
        return logits + self.decoder_bias[...]  # [R, P, V]

    def next_sentence_logits(self, batch: Batch) -> jax.Array:
        """Return the logits of BERT's next-sentence head, [R, M, 2] float32, without dropout."""
        pooled = self.pooler(tokens_at(self.encode(batch), batch["cls_index"]))  # [R, M, H]
        return self.next_sentence(pooled)  # [R, M, 2]


def multiplies_every_token(name: str, config: EncoderConfig, pooling: str) -> bool:
    """Return whether a parameter of a `Classifier` is a matrix that multiplies every token of a batch.

    Args:
      name: the dotted path of the parameter, such as `encoder.layers.0.output.kernel`.
      config: the encoder's architecture.
      pooling: one of `POOLINGS`. With "cls", the last layer is taken to compute only the tokens that the head reads.
    """
    module, _, leaf = name.rpartition(".")
    if leaf != "kernel":
        return False
    if module.startswith("encoder.layers."):
        index, inner = module.removeprefix("encoder.layers.").split(".", 1)
        is_last = int(index) == config.num_layers - 1
        return config.multiplies_every_token(inner, at_positions=is_last and pooling == "cls")
    return pooling == "late" if module.startswith("pooler.") else module != "head"


def segment_mean(hidden: jax.Array, segment_ids: jax.Array, slots: int) -> jax.Array:
    """Return the mean of each segment's tokens, [R, slots, H] float32: slot m holds segment m + 1, or zeros."""
    segment = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
    member = (segment_ids[:, None, :] == segment[None, :, None]).astype(hidden.dtype)  # [R, M, S]
    total = jnp.einsum("rms,rsh->rmh", member, hidden, preferred_element_type=jnp.float32)  # [R, M, H]
    count = jnp.sum(member, axis=-1, dtype=jnp.float32)[:, :, None]  # [R, M, 1]
    return total / jnp.maximum(count, 1.0)


def _dropout_key(batch: Batch, key: jax.Array | None) -> DropoutKey | None:
    return None if key is None else DropoutKey(key, batch.get("row_index"))


def _encode(encoder: Encoder, batch: Batch, key: DropoutKey | None, positions: jax.Array | None = None) -> jax.Array:
    """Return the output of the encoder, [R, S, H], or at positions [R, Q] only, [R, Q, H]."""
    ids = (batch[name] for name in ("input_ids", "token_type_ids", "position_ids", "segment_ids"))
    return encoder(*ids, dropout_key=at_site(key, 0), embedded=batch.get("embedded"), positions=positions)
