"""The embedded mini checkpoints: 3 layers × 128, on the synthetic text of the task `minireviews`.

python -m xtransfer.pretrain --config configs/pretrain_mini.py:english --output mini-bert-en
python -m xtransfer.pretrain --config configs/pretrain_mini.py:multilingual --output mini-bert-multilingual
"""

from ml_collections import ConfigDict

from xtransfer import config as settings

LANGUAGES = {"english": ("en",), "multilingual": ("en", "de", "fr", "ja")}


def get_config(arg: str = "english") -> ConfigDict:
    """`english`, or `multilingual`: the same size, shared by four languages."""
    if arg not in LANGUAGES:
        raise ValueError(f"{arg!r} is not one of {', '.join(LANGUAGES)}")
    config = settings.default(settings.PretrainConfig)
    config.languages = LANGUAGES[arg]
    config.task.name = "minireviews"
    config.vocab_size = 6000
    # English alone is learnt sooner. Per language the multilingual model still sees far less text: the paper's premise.
    config.steps = {"english": 4500, "multilingual": 7500}[arg]
    return config
