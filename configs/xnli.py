"""XNLI: entailment in 15 languages, trained on English MultiNLI, with real base encoders.

    python -m xtransfer.main --config configs/xnli.py --workdir runs/xnli
    python -m xtransfer.main --config configs/xnli.py:few --workdir runs/xnli-few

The first uses all of MultiNLI as labelled text; the second 1,000 labels, the rest of it without them. The archives
multinli_1.0.zip and XNLI-1.0.zip are downloaded (245 MB), or taken from `--config.task.data_dir=FOLDER`.

It has not been run by the authors. Published zero-shot accuracy of fine-tuning alone, in %: multilingual BERT en 81.4,
de 70.5, es 74.3, zh 63.8, ar 62.1, ur 58.3; XLM-R base about 75 over all languages.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for all labels, "few" for 1,000 of them."""
    config = settings.default()
    config.task.name = "xnli"
    config.task.unlabelled_from = "train_rest"
    for model in (config.teacher, config.student):
        model.max_length = 128
        model.compute_dtype = "bfloat16"
    config.teacher.checkpoint = "FacebookAI/roberta-base@main"
    config.student.checkpoint = "FacebookAI/xlm-roberta-base@main"
    if arg == "few":
        config.task.labelled = 1000
        config.teacher.steps = 300
        config.student.steps = 10000
    else:  # two epochs of 392,702 examples; there is no text left that has no label
        config.task.unlabelled_from = "none"
        for model in (config.teacher, config.student):
            model.batch_size, model.steps = 128, 6136
        config.objectives = ("vanilla", "monox_kd")
    return config
