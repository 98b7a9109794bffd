"""An objective of your own, beside two of the paper's: the quickstart's data with a mix of labels and teacher logits.

python -m xtransfer.main --config configs/own_objective.py --workdir runs/own-objective

`config.objective.NAME` defines it here, and flags change it, such as `--config.objective.labels_and_kd.hard_weight=1`.

Measured with `--config.seeds="(0,)"`: accuracy in %. One seed does not show which of the last two is better.

objective       en (source)  average of de, fr, ja   gain over vanilla
vanilla         86.1         84.2
monox_kd        93.2         92.8                    +8.6
labels_and_kd   93.8         93.2                    +9.0
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the config: the quickstart's, with `vanilla`, `monox_kd`, and the objective `labels_and_kd`."""
    config = settings.default()
    config.task.name = "minireviews"
    config.task.source_language = "en"
    config.task.labelled = 128
    config.task.unlabelled = 2000
    for model in (config.teacher, config.student):
        model.max_length = 64
        model.batch_size = 32
        model.frozen = (r"^encoder\.embeddings\.",)
    config.teacher.checkpoint = "mini-bert-en"
    config.student.checkpoint = "mini-bert-multilingual"
    config.teacher.learning_rate, config.teacher.steps = 5e-4, 100
    config.student.learning_rate, config.student.steps, config.student.evaluations = 1e-3, 160, 3
    config.seeds = (0, 1, 2)

    # It starts from monox_kd, so it reads the monolingual teacher's logits of labelled and unlabelled text. The first
    # term is for labelled text alone.
    config.objective.labels_and_kd = {
        "base": "monox_kd",
        "hard_weight": 0.5,
        "soft_weight": 0.5,
        "label_smoothing": 0.1,
        "temperature": 2.0,
    }
    config.objectives = ("vanilla", "monox_kd", "labels_and_kd")
    return config
