"""SIB-200: topics of sentences in 205 languages (Adelani et al., EACL 2024), with real base encoders and 200 labels.

    python -m xtransfer.main --config configs/sib200.py --workdir runs/sib200 \\
      --config.task.target_languages="('deu_Latn','fra_Latn','swh_Latn')"

Without `task.data_dir`, the files of the named languages are downloaded (0.2 MB each). Base encoders need an
accelerator. We have run this config for two steps only, with the encoders of `small`, so it states no expected result.

    --config configs/sib200.py:small --config.task.data_dir=DIR

trains on a laptop: multilingual-e5-small learns from all-MiniLM-L6-v2 and 140 labels, for eleven target languages. We
have run only parts of it, and its settings are not tuned, so it states no expected result yet.
`configs/studies/sib200.py` compares 35, 140, and all labels, and a multilingual teacher.

    --config configs/sib200.py:mini

uses the embedded mini encoders, which have seen only synthetic reviews. It shows that the files can be read and that
everything runs. Expect no more than the share of the majority class, 25 %.
"""

from ml_collections import ConfigDict

from xtransfer import config as settings

SMALL_LANGUAGES = (
    *("arb_Arab", "deu_Latn", "fra_Latn", "hin_Deva", "jpn_Jpan", "rus_Cyrl"),
    *("spa_Latn", "swh_Latn", "tur_Latn", "vie_Latn", "zho_Hans"),
)


def get_config(arg: str = "") -> ConfigDict:
    """Return the config for `arg`: "" for base encoders, "small" for small ones, "mini" for the embedded ones."""
    if arg not in ("", "small", "mini"):
        raise ValueError(f"{arg!r} is not one of small, mini")
    config = settings.default()
    config.task.name = "sib200"
    config.task.source_language = "eng_Latn"
    config.task.target_languages = ("deu_Latn", "fra_Latn", "spa_Latn", "rus_Cyrl")
    config.task.labelled = 200
    config.task.unlabelled_from = "train_rest"
    for model in (config.teacher, config.student):
        model.max_length = 128
        model.batch_size = 32
    config.teacher.checkpoint, config.teacher.steps = "google-bert/bert-base-cased@main", 200
    config.student.checkpoint, config.student.steps = "FacebookAI/xlm-roberta-base@main", 600
    if arg == "small":
        config.task.labelled = 140
        config.task.target_languages = SMALL_LANGUAGES
        config.teacher.checkpoint = "sentence-transformers/all-MiniLM-L6-v2@main"
        config.student.checkpoint = "intfloat/multilingual-e5-small@main"
        config.student.frozen = (r"^encoder\.embeddings\.word_embeddings\.",)
        for model in (config.teacher, config.student):
            model.pooling = "mean"
            model.learning_rate, model.steps, model.evaluations = 1e-4, 100, 2
    if arg == "mini":
        config.teacher.checkpoint, config.student.checkpoint = "mini-bert-en", "mini-bert-multilingual"
        for model in (config.teacher, config.student):
            model.learning_rate, model.steps = 1e-3, 300
    return config
