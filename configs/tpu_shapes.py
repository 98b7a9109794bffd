"""What the steps of published encoders take on TPUs, compiled ahead of time: shapes alone, no weights and no tokenizer.

    python -m xtransfer.precompile --config configs/tpu_shapes.py:mbert --topology v5e:2x4 \
        --rows-per-chip 128 --row-length 128 --unpacked
    python -m xtransfer.precompile --config configs/tpu_shapes.py:xlmr_large --topology v5e:2x4 \
        --rows-per-chip 16 --row-length 128 --unpacked --config.mesh.fsdp=8

Expected of student_train with libtpu 0.0.52: 124.5 Mcycles and 4.1 GiB a chip for the first, with 32 rows 38.9 and
3.3; for the second 73.6 and 4.1.

It is for `xtransfer.precompile` only: there is nothing in it to train.
"""

from pathlib import Path

from ml_collections import ConfigDict

from xtransfer import config as settings

SHAPES = {"mbert": "bert-base-multilingual-cased", "xlmr_large": "xlm-roberta-large"}


def get_config(arg: str = "mbert") -> ConfigDict:
    """`arg`: "mbert" for multilingual BERT base, "xlmr_large" for XLM-R large; teacher and student alike."""
    config = settings.default()
    config.task.name = "minireviews"  # for its two classes
    for model in (config.teacher, config.student):
        model.checkpoint = str(Path(__file__).parent / "shapes" / SHAPES[arg or "mbert"])
        model.max_length = 128
        model.compute_dtype = "bfloat16"
    return config
