"""Several teachers for one student, on SIB-200: two read English, and one reads German.

    python -m xtransfer.main --config configs/teachers.py --workdir runs/teachers --config.task.data_dir=DIR

The student learns from English and German text, each example with the mean of the teachers that read its language, and
is scored zero-shot in the other languages. `task.labelled` and `task.unlabelled` hold for each language. Replace the
German teacher by an encoder of German; here it is a multilingual one, because it is small. We have run this config
for 15 steps of each model only, so it states no expected result.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the config: all-MiniLM-L6-v2 twice for English, multilingual-e5-small for German and as the student."""
    config = settings.default()
    config.task.name = "sib200"
    config.task.source_language = "eng_Latn"
    config.task.target_languages = ("fra_Latn", "spa_Latn", "swh_Latn")
    config.task.labelled = 140
    config.task.unlabelled_from = "train_rest"
    frozen = (r"^encoder\.embeddings\.word_embeddings\.",)
    config.teacher.checkpoint = "sentence-transformers/all-MiniLM-L6-v2@main"
    config.student.checkpoint = "intfloat/multilingual-e5-small@main"
    config.student.frozen = frozen
    for model in (config.teacher, config.student):
        model.pooling = "mean"
        model.learning_rate, model.steps, model.evaluations = 1e-4, 100, 1
    # What an entry leaves out is as in config.teacher.
    config.teachers = {
        "second": {"seed": 1},
        "german": {"checkpoint": config.student.checkpoint, "languages": ("deu_Latn",), "frozen": frozen},
    }
    config.objectives = ("vanilla", "monox_kd")
    config.seeds = (0,)
    return config
