"""Webis-CLS-10: Amazon reviews, the paper's sentiment task, from English to German, French, and Japanese.

    python -m xtransfer.main --config configs/webis_cls.py:books --workdir runs/books --config.task.data_dir=ARCHIVE

ARCHIVE is cls-acl10-unprocessed.tar.gz from Zenodo record 3251672, or the folder with its contents. Zenodo may ask you
to request access first. The domains are books, dvd, and music. Train has 2,000 labelled reviews, of which a tenth is
held out as dev. Of the 9,000 to 170,000 reviews without labels, 20,000 are used.

We have run this config for two steps only, to the report, on a few texts of our own in the publisher's format, with
all-MiniLM-L6-v2 and multilingual-e5-small in place of the base encoders. So it states no expected result.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "books") -> ConfigDict:
    """Return the config for the domain `arg`."""
    config = settings.default()
    config.task.name = f"webis_cls/{arg}"
    config.task.empty_text = "skip"
    config.task.unlabelled = 20000
    for model in (config.teacher, config.student):
        model.max_length = 256
        model.batch_size = 32
        model.compute_dtype = "bfloat16"
    config.teacher.checkpoint, config.teacher.steps = "FacebookAI/roberta-base@main", 300
    config.student.checkpoint, config.student.steps = "FacebookAI/xlm-roberta-base@main", 2000
    return config
