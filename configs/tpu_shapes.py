"""The time and memory of published encoders on TPUs, compiled ahead of time. Only shapes are needed, and no weights.

    python -m xtransfer.precompile --config configs/tpu_shapes.py:mbert --topology v5e:2x4 \
        --rows-per-chip 128 --row-length 128 --unpacked
    python -m xtransfer.precompile --config configs/tpu_shapes.py:xlmr_large --topology v5e:2x4 \
        --rows-per-chip 16 --row-length 128 --unpacked --config.mesh.fsdp=8
    python -m xtransfer.precompile --config configs/tpu_shapes.py:modernbert --topology v5e:2x4 \
        --rows-per-chip 1 --row-length 8192 --unpacked --steps evaluation

Expected for student_train with the pinned libtpu, 0.0.42.1: the first command says 107.5 Mcycles and 2.41 GiB per
chip (with 32 rows per chip, 29.0 and 1.81), and the third 190.2 Mcycles and 0.72 GiB; a training step of that size
compiles for many minutes. The second was last compiled with libtpu 0.0.52, before chips shared the update of the table
of words: 73.6 and 4.1.

This config is for `xtransfer.precompile` only. There is nothing in it to train.
"""

from pathlib import Path

from ml_collections import ConfigDict

from xtransfer import config as settings

SHAPES = {
    "mbert": "bert-base-multilingual-cased",
    "xlmr_large": "xlm-roberta-large",
    "modernbert": "modernbert-base",
}


def get_config(arg: str = "mbert") -> ConfigDict:
    """Return the config for `arg`, the teacher and the student: a key of `SHAPES`."""
    config = settings.default()
    config.task.name = "minireviews"  # for its two classes
    for model in (config.teacher, config.student):
        model.checkpoint = str(Path(__file__).parent / "shapes" / SHAPES[arg or "mbert"])
        model.max_length = 128
        model.compute_dtype = "bfloat16"
    return config
