"""The embedded mini checkpoints: 3 layers × 128, on the synthetic text of the task `minireviews`.

python -m xtransfer.pretrain --config configs/pretrain_mini.py:english --output mini-bert-en
python -m xtransfer.pretrain --config configs/pretrain_mini.py:multilingual_first --output mini-bert-multilingual-first
python -m xtransfer.pretrain --config configs/pretrain_mini.py:multilingual --output mini-bert-multilingual
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "english") -> ConfigDict:
    """`english`; `multilingual_first`, then `multilingual`: the same size, shared by four languages."""
    config = settings.default(settings.PretrainConfig)
    config.task.name = "minireviews"
    config.vocab_size = 6000
    if arg == "english":
        config.steps = 4500
        return config
    config.languages = ("en", "de", "fr", "ja")
    # One model of four languages is slower to learn, and the languages must meet first: translations and reviews in
    # equal shares. Then more reviews, from which it learns what an opinion is.
    if arg == "multilingual_first":
        config.steps = 7500
    elif arg == "multilingual":
        config.start_from = "mini-bert-multilingual-first"
        config.pair_fraction = 0.25
        config.learning_rate = 7e-4
        config.steps = 4000
    else:
        raise ValueError(f"{arg!r}: english, multilingual_first or multilingual")
    return config
