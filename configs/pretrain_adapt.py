"""Task-adaptive pretraining: continue a checkpoint's masked language modelling on your own target-language text.

    python -m xtransfer.pretrain --config configs/pretrain_adapt.py --output adapted \\
      --config.start_from=intfloat/multilingual-e5-small@main \\
      --config.task.data_dir=DIR --config.languages="('deu_Latn','swh_Latn')"

Each language's text is DIR/LANGUAGE/unlabelled.tsv, with a column `text`; no other file is needed. Afterwards, train a
student from the result: `--config.student.checkpoint=adapted`. This is still zero-shot, but it has used text of the
target languages (Gururangan et al., "Don't Stop Pretraining", ACL 2020). Sentence encoders such as e5 come without a
language model's head, so theirs starts anew.
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
