"""Task-adaptive pretraining: continue a checkpoint's masked language modelling on your own target-language text.

    python -m xtransfer.pretrain --config configs/pretrain_adapt.py --output adapted \\
      --config.start_from=intfloat/multilingual-e5-small@main \\
      --config.task.data_dir=DIR --config.languages="('deu_Latn','swh_Latn')"

Each language's text is DIR/LANGUAGE/unlabelled.tsv, with a column `text`; no other file is needed. Afterwards, train a
student from the result: `--config.student.checkpoint=adapted`. This is still zero-shot, but it has used text of the
target languages (Gururangan et al., "Don't Stop Pretraining", ACL 2020).

A checkpoint without a language model's head gets a new one. multilingual-e5-small is such a checkpoint, and it became
worse: tried once, on 30 November 2026 at commit 7c92914, with `--config.steps=200` and the 7,711 training sentences of
SIB-200's eleven target languages, whose loss fell from 12.6 to 9.9 nats. Students trained from the result with
`configs/sib200.py:small`, on the first labelled sample, scored 61.9 instead of 79.2 % (`vanilla`) and 75.2 instead of
80.7 % (`monox_kd`) on average of the target languages. In English, `vanilla` lost 1.5 points and `monox_kd` none. We
suppose that a new head first disturbs the alignment of the languages, which e5 was trained for.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe: 500 steps of plain masked language modelling at a small learning rate."""
    config = settings.default(settings.PretrainConfig)
    config.task.name = "files"
    config.learning_rate = 5e-5
    config.pretraining_dropout = 0.1
    config.row_length, config.rows, config.masks = 128, 16, 19
    config.steps = 500
    return config
