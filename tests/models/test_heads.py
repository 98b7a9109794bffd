"""The matrices of a classifier that multiply every token, counted by hand."""

import dataclasses
from typing import Any

import pytest

from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import multiplies_every_token
from xtransfer.models.hf.checkpoint import abstract_classifier
from xtransfer.models.hf.weights import leaves

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 12,
    "max_positions": 10,
}
SQUARE, WIDE = 8 * 8, 8 * 12  # one of attention's matrices, and one of the feed-forward network's
KEY_AND_VALUE = 2 * SQUARE
PLAIN, GATED = 4 * SQUARE + 2 * WIDE, 4 * SQUARE + 3 * WIDE  # a layer
GROUPED = 2 * SQUARE + 2 * (8 * 4) + 3 * WIDE  # a gated layer with one head of keys and values
CONVOLUTION = 3 * SQUARE


def configured(architecture: str, **settings: Any) -> EncoderConfig:
    return ARCHITECTURES[architecture].config_class(**SIZES | {"architecture": architecture} | settings)


def counted(config: EncoderConfig, pooling: str) -> int:
    _, state = abstract_classifier(config, 5, pooling=pooling)
    return sum(
        variable.size for name, variable in leaves(state).items() if multiplies_every_token(name, config, pooling)
    )


@pytest.mark.parametrize(
    ("config", "whole", "last"),
    [
        (configured("bert"), PLAIN, KEY_AND_VALUE),
        (configured("xlm_roberta_xl"), PLAIN, KEY_AND_VALUE),
        (configured("gte"), GATED, KEY_AND_VALUE),
        (configured("modernbert", layer_types=("full_attention",) * 3), GATED, KEY_AND_VALUE),
        (configured("eurobert", kv_heads=1), GROUPED, 2 * (8 * 4)),
        (configured("deberta"), PLAIN, 4 * SQUARE),
    ],
    ids=lambda value: getattr(value, "architecture", None),
)
def test_last_layer_has_fewer_matrices_for_every_token_if_the_head_reads_some(
    config: EncoderConfig, whole: int, last: int
) -> None:
    assert counted(config, "mean") == 3 * whole
    assert counted(config, "late") == 3 * whole + SQUARE  # the pooler
    assert counted(config, "cls") == 2 * whole + last
    assert counted(dataclasses.replace(config, num_layers=1), "cls") == last


def test_embeddings_are_projected_for_every_token() -> None:
    assert counted(configured("bert", embedding_size=4), "cls") == 4 * 8 + 2 * PLAIN + KEY_AND_VALUE


def test_convolution_reads_every_token_also_beside_the_last_layer() -> None:
    config = configured("deberta", buckets=4, convolution_size=3)
    assert counted(config, "mean") == CONVOLUTION + 3 * PLAIN
    assert counted(config, "cls") == CONVOLUTION + 2 * PLAIN + 4 * SQUARE
    assert counted(dataclasses.replace(config, num_layers=1), "cls") == CONVOLUTION + PLAIN
