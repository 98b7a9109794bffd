"""Your own files: TSV, CSV, JSONL, or Parquet, with columns that you name.

For example, take files `DIR/<language>/{train,dev,test}.tsv` with the columns id, topic, and text. 200 of the English
training examples are used with their labels, and the rest without:

    python -m xtransfer.main --config configs/files.py --workdir runs/topics --config.task.data_dir=DIR \\
      --config.task.source_language=en --config.task.target_languages="('de','fr')" \\
      --config.task.label_column=topic --config.task.id_column=id --config.task.labelled=200

If one file holds all languages of a split, name the column of the language:

      --config.task.path='{split}.parquet' --config.task.language_column=lang

If a text has any number of labels, in lists of JSONL or Parquet, or in cells such as "positive|books":

      --config.task.multi_label=True --config.task.label_separator=bar

The embedded mini encoders have seen only synthetic reviews, so expect little of them on real text. Name real encoders
with `--config.teacher.checkpoint=… --config.student.checkpoint=…` and their usual learning rate of 2e-5.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the config: the embedded encoders, and files at `task.path` below `task.data_dir`."""
    config = settings.default()
    config.task.name = "files"
    config.task.path = "{language}/{split}.tsv"
    config.task.unlabelled_from = "train_rest"
    for model in (config.teacher, config.student):
        model.max_length = 128
        model.learning_rate = 1e-3
        model.batch_size = 32
        model.steps = 300
    config.teacher.checkpoint = "mini-bert-en"
    config.student.checkpoint = "mini-bert-multilingual"
    return config
