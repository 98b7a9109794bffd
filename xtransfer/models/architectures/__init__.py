"""The table of architectures. A new one is a file of its own and a line here."""

from collections.abc import Mapping
from typing import Any

from xtransfer.models.architectures.bert import BertEncoder
from xtransfer.models.architectures.deberta import DebertaEncoder
from xtransfer.models.architectures.eurobert import EuroBertEncoder
from xtransfer.models.architectures.gte import GteEncoder
from xtransfer.models.architectures.modernbert import ModernBertEncoder
from xtransfer.models.architectures.xlm_roberta_xl import XlmRobertaXlEncoder

ARCHITECTURES: Mapping[str, Any] = {
    "bert": BertEncoder,
    "deberta": DebertaEncoder,
    "eurobert": EuroBertEncoder,
    "gte": GteEncoder,
    "modernbert": ModernBertEncoder,
    "xlm_roberta_xl": XlmRobertaXlEncoder,
}
"""`EncoderConfig.architecture` -> the encoder's class, a subclass of `Encoder`, which takes rngs, dtype, and remat."""
