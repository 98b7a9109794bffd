"""What all encoders share: their configuration, and how embeddings and layers follow each other.

Each architecture is a file of `architectures`. Shapes: R rows, S tokens per row, H hidden size, E embedding size.
Parameters are float32. `dtype` is the dtype of the large matrix products; softmax and the statistics of norms are
float32 whatever `dtype` is.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.attention_in_blocks import BLOCK
from xtransfer.models.dropout import DropoutKey, at_site
from xtransfer.models.layers import ACTIVATIONS, LayerNorm, tokens_at
from xtransfer.models.visibility import Visibility


def may_be_zero(default: int) -> Any:
    """Declare a setting of an architecture that counts something and may be 0; others must be positive."""
    return field(default=default, metadata={"may_be_zero": True})


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of an encoder and its classification head, as its checkpoint states it; the defaults are BERT's.

    An architecture with further settings has a subclass of its own.

    Attributes:
      type_vocab_size: the number of token types, 0 if the encoder has none.
      norm_bias: whether LayerNorms have biases.
      classifier_dropout: the rate before the head; None stands for `hidden_dropout`.
      position_offset: the position id of an example's first token.
      embedding_size: the width of the embedding tables; None stands for `hidden_size`. Other widths are projected.
      attention_output_dropout: whether a layer applies dropout between its attention and the residual.
      head_act: the activation of the pooler.
      masked_lm_act: the activation of the masked language model's head; None stands for `hidden_act`.
      head_input_dropout: whether the head applies dropout to its input too.
      family: the name of the weight table, a key of `models.hf.families.FAMILIES`.
      architecture: the encoder's module, a key of `models.architectures.ARCHITECTURES`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    norm_bias: bool = True
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

    @property
    def head_input_rate(self) -> float:
        """The dropout rate before the pooler."""
        return self.classifier_rate if self.head_input_dropout else 0.0

    def with_dropout(self, rate: float) -> Self:
        """Return these settings with one dropout rate at all sites of the encoder."""
        return replace(self, hidden_dropout=rate, attention_dropout=rate)

    @property
    def pooler_bias(self) -> bool:
        """Whether the dense layer of the pooler has a bias."""
        return True

    @property
    def pooler_norm(self) -> bool:
        """Whether a LayerNorm follows the activation of the pooler."""
        return False

    @property
    def predicts_with_pooler(self) -> bool:
        """Whether the masked language model's head is the pooler, and not a transform of its own."""
        return False

    def multiplies_every_token(self, module: str, *, at_positions: bool) -> bool:
        """Return whether the matrix of a layer's module multiplies every token of a batch.

        Args:
          module: the path of the module in the layer, such as `attention.query`.
          at_positions: whether the layer computes some positions only, see `Encoder.hidden_states`.
        """
        return not at_positions or module in ("attention.key", "attention.value")


class Encoder(nnx.Module):
    """Embeddings and layers. With `remat`, the backward pass computes each layer again from its input.

    An architecture fills `embeddings` and `layers`. It overrides `context` if its layers read more than who sees
    whom, and `finish` if something follows the last layer. `config_class` is the class of its settings.
    """

    config_class: ClassVar[type[EncoderConfig]] = EncoderConfig
    embeddings: Any
    layers: nnx.List[Any]

    def __init__(self, config: EncoderConfig, *, remat: bool = False):
        check(config)
        self.remat = remat

    def context(self, position_ids: jax.Array, segment_ids: jax.Array) -> Any:
        """Return what all layers read beside their input, from ids [R, S] int32: here who sees whom."""
        return Visibility.of_segments(segment_ids)

    def finish(self, x: jax.Array) -> jax.Array:
        """Transform the output of the last layer, token by token: [R, S, H] -> [R, S, H]."""
        return x

    def __call__(self, *inputs: jax.Array, **options: Any) -> jax.Array:
        """Return the last of `hidden_states`, [R, S or Q, H] in the compute dtype; takes the same arguments."""
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
        positions: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Return the input of the first layer and the output of every layer, each [R, S, H] in the compute dtype.

        The last one went through `finish`. A token attends to tokens of its own segment only. Tokens of segment 0,
        which is padding, attend to padding: their values are finite, and no other token sees them.

        Args:
          input_ids, token_type_ids, position_ids, segment_ids: [R, S] int32.
          dropout_key: the key of all masks; None turns dropout off.
          embedded: [R, S, H], the output of `embed`, if it was called before.
          positions: [R, Q] int32. The last state has only the tokens there, [R, Q, H], and the last layer computes only
            them if Q is at most `BLOCK`: more would need more memory in long rows than attention in blocks. Its
            dropout masks are then those of Q tokens.
        """
        context = self.context(position_ids, segment_ids)
        if embedded is None:
            embedded = self.embed(input_ids, token_type_ids, position_ids, dropout_key=dropout_key)
        states = [embedded]  # [R, S, H]
        queries = positions if positions is not None and positions.shape[1] <= BLOCK else None
        for index, layer in enumerate(self.layers):
            run = nnx.remat(type(layer).__call__) if self.remat else type(layer).__call__
            at = queries if index == len(self.layers) - 1 else None
            states.append(run(layer, states[-1], context, at_site(dropout_key, index + 1), at))  # [R, S, H]
        last = states.pop() if queries is not None else tokens_at(states.pop(), positions)  # [R, S or Q, H]
        return [*states, self.finish(last)]

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


def layer_norm(config: EncoderConfig, rngs: nnx.Rngs, dtype: DTypeLike, size: int | None = None) -> LayerNorm:
    """Return a LayerNorm over `size` features, by default H."""
    return LayerNorm(
        size or config.hidden_size, epsilon=config.layer_norm_eps, use_bias=config.norm_bias, dtype=dtype, rngs=rngs
    )


def check(config: EncoderConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    if config.hidden_size % config.num_heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    for act in (config.hidden_act, config.head_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r}: one of {', '.join(ACTIVATIONS)}")
