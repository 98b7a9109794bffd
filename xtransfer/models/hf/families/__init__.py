"""The table of families, by the `model_type` of config.json. A new family is a file of its own and a line here."""

from xtransfer.models.hf.families.bert import BERT
from xtransfer.models.hf.families.deberta import DEBERTA_V2
from xtransfer.models.hf.families.distilbert import DISTILBERT
from xtransfer.models.hf.families.electra import ELECTRA
from xtransfer.models.hf.families.eurobert import EUROBERT
from xtransfer.models.hf.families.gte import GTE, NEW
from xtransfer.models.hf.families.modernbert import MODERNBERT
from xtransfer.models.hf.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from xtransfer.models.hf.families.xlm_roberta_xl import XLM_ROBERTA_XL
from xtransfer.models.hf.weight_map import Family

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "modernbert": MODERNBERT,
    "deberta-v2": DEBERTA_V2,
    "eurobert": EUROBERT,
    "gte": GTE,
    "new": NEW,
    "xlm-roberta-xl": XLM_ROBERTA_XL,
}
