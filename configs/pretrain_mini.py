"""The embedded mini encoders: 3 layers of width 128, pretrained on the synthetic text of the task `minireviews`.

python -m xtransfer.pretrain --config configs/pretrain_mini.py:english --output mini-bert-en
python -m xtransfer.pretrain --config configs/pretrain_mini.py:multilingual --output mini-bert-multilingual
"""

from ml_collections import ConfigDict

from xtransfer import config as settings

LANGUAGES = {"english": ("en",), "multilingual": ("en", "de", "fr", "ja")}


def get_config(arg: str = "english") -> ConfigDict:
    """Return the config for `arg`: "english", or "multilingual", which is the same size for four languages."""
    if arg not in LANGUAGES:
        raise ValueError(f"{arg!r} is not one of {', '.join(LANGUAGES)}")
    config = settings.default(settings.PretrainConfig)
    config.languages = LANGUAGES[arg]
    config.task.name = "minireviews"
    config.vocab_size = 6000
    config.split_texts = config.split_pairs = 0.5
    # The multilingual encoder sees far less text per language: the paper's premise.
    config.steps = {"english": 3000, "multilingual": 4000}[arg]
    return config
