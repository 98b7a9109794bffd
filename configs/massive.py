"""MASSIVE: 60 intents (or 18 scenarios) of spoken requests in 51 locales (FitzGerald et al., ACL 2023).

    python -m xtransfer.main --config configs/massive.py --workdir runs/massive
    python -m xtransfer.main --config configs/massive.py:scenario --workdir runs/massive-scenario

The archive (39.5 MB) is downloaded, or taken from `--config.task.data_dir`. All English requests have labels of their
intents, some of which are too rare for a balanced draw; of the scenarios there are 100 labels each, and the rest of the
requests has none.

It has not been run by the authors: no expected result stands here.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "intent") -> ConfigDict:
    """`arg`: what is classified, intent or scenario."""
    config = settings.default()
    config.task.name = f"massive/{arg}"
    config.task.source_language = "en-US"
    config.task.target_languages = ("de-DE", "fr-FR", "ja-JP", "sw-KE", "tr-TR", "zh-CN")
    if arg == "scenario":
        config.task.labelled, config.task.unlabelled_from = 1800, "train_rest"
    else:
        config.task.unlabelled_from = "none"
        config.objectives = ("vanilla", "monox_kd")
    for model in (config.teacher, config.student):
        model.max_length = 48
        model.compute_dtype = "bfloat16"
    config.teacher.checkpoint, config.teacher.steps = "FacebookAI/roberta-base@main", 500
    config.student.checkpoint, config.student.steps = "FacebookAI/xlm-roberta-base@main", 3000
    return config
