"""Real text and real encoders: how much MonoX-KD helps with few labels and with many.

    python -m xtransfer.study --config configs/studies/sib200.py --workdir runs/sib200-study
    python -m xtransfer.study --config configs/studies/sib200.py:DIR --workdir runs/sib200-study

The first command downloads SIB-200's files, and the second reads them from DIR. Every variant changes
`configs/sib200.py:small`: multilingual-e5-small, eleven target languages, and by default 140 English labels and the
other training texts without labels. Repetitions redraw the labelled sample, except with all labels, where they redraw
the new head and the order of the batches.

@TABLE@
"""

from xtransfer.study.design import Study

SAMPLES = range(5)
FEWER = SAMPLES[:3]  # for the variants around the default


def get_study(arg: str = "") -> Study:
    """Return the study. `arg` is the directory with SIB-200's files, or "" to download them."""
    data = (f"task.data_dir={arg}",) if arg else ()
    two = "objectives=('vanilla', 'monox_kd')"
    everything = ("task.labelled=0", "task.unlabelled_from=none", two)

    def sample(seed: int, *changes: str) -> tuple[str, ...]:
        return (*data, "seeds=(0,)", f"task.labelled_seed={seed}", *changes)

    return Study(
        base="configs/sib200.py:small",
        variants={
            "140 labels": [sample(seed, "objectives=('vanilla', 'monox_kd', 'self_training')") for seed in SAMPLES],
            "35 labels": [sample(seed, "task.labelled=35", two) for seed in FEWER],
            "all 701 labels": [(*data, f"seeds=({seed},)", f"teacher_seed={seed}", *everything) for seed in FEWER],
        },
    )
