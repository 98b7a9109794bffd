"""PAWS-X: paraphrase identification in 7 languages (Yang et al., EMNLP 2019), with real base encoders and few labels.

    python -m xtransfer.main --config configs/paws_x.py --workdir runs/paws_x

x-final.tar.gz (30 MB) is downloaded, or read from `--config.task.data_dir`. 1,000 English pairs are used with their
labels, and 20,000 more without.

We have run this config for two steps only, to the report, on a few texts of our own in the publisher's format, with
all-MiniLM-L6-v2 and multilingual-e5-small in place of the base encoders. So it states no expected result.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the config in which RoBERTa base teaches XLM-R base."""
    config = settings.default()
    config.task.name = "paws_x"
    config.task.labelled = 1000
    config.task.unlabelled_from = "train_rest"
    config.task.unlabelled = 20000
    for model in (config.teacher, config.student):
        model.max_length = 128
        model.compute_dtype = "bfloat16"
    config.teacher.checkpoint, config.teacher.steps = "FacebookAI/roberta-base@main", 500
    config.student.checkpoint, config.student.steps = "FacebookAI/xlm-roberta-base@main", 3000
    return config
