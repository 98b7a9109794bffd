"""Your own files: one TSV, CSV or JSONL per language and split, with columns that you name.

For example SIB-200 (topics of sentences, 7 classes; files `<language>/{train,dev,test}.tsv` below DIR), with 200 of
the 701 English sentences labelled and the rest of them as unlabelled text:

    python -m xtransfer.main --config configs/files.py --workdir runs/sib200 --config.task.data_dir=DIR \\
      --config.task.source_language=eng_Latn --config.task.target_languages="('deu_Latn','fra_Latn')" \\
      --config.task.label_column=category --config.task.id_column=index_id --config.task.labelled=200

The embedded mini checkpoints have seen nothing but synthetic reviews, so expect little of them on real text; give
real ones with `--config.teacher.checkpoint=… --config.student.checkpoint=…` and their usual learning rate of 2e-5.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """The embedded encoders on `task.path` below `task.data_dir`; what train leaves over is the unlabelled text."""
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
