"""The table of families, by the `model_type` of config.json. A new family is a file of its own and a line here."""

from xtransfer.models.hf.families.bert import BERT
from xtransfer.models.hf.families.distilbert import DISTILBERT
from xtransfer.models.hf.families.electra import ELECTRA
from xtransfer.models.hf.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from xtransfer.models.hf.weight_map import Family

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
}
