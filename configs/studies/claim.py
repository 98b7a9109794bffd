"""The claim on the embedded task: repetitions, ablations, and intervals, as one command.

    python -m xtransfer.study --config configs/studies/claim.py:dev --workdir runs/claim-dev
    python -m xtransfer.study --config configs/studies/claim.py --workdir runs/claim

The first command scores the dev split, which another random stream wrote than the test split. It is for developing a
recipe. The second scores the test split, once for each final recipe. `main` repeats the quickstart over three
pretraining seeds and five labelled samples. The ablations repeat `vanilla` and `monox_kd` over five samples, with the
embedded encoders. Compare them with "as in the quickstart". Expect hours on two CPU cores; we have not run it in full.
`--variants main` runs a part.
"""

from xtransfer.study.design import Study

QUICKSTART = "configs/quickstart.py"
PRETRAINING = "configs/pretrain_mini.py"
SAMPLES = range(5)
# Seed 0 is embedded.
SEEDS = (("mini-bert-en", "mini-bert-multilingual"), ("{en_1}", "{multi_1}"), ("{en_2}", "{multi_2}"))


def get_study(arg: str = "") -> Study:
    """Return the study. `arg` is "" for the test split, or "dev"."""
    fixed = ("seeds=(0,)", f"evaluation_splits=('{arg or 'test'}',)")

    def samples(*changes: str) -> list[tuple[str, ...]]:
        return [(*fixed, f"task.labelled_seed={sample}", *changes) for sample in SAMPLES]

    def ablation(*changes: str) -> list[tuple[str, ...]]:
        return samples("objectives=('vanilla', 'monox_kd')", *changes)

    main = [
        repetition
        for teacher, student in SEEDS
        for repetition in samples(f"teacher.checkpoint={teacher}", f"student.checkpoint={student}")
    ]
    variants = {
        "main": main,
        "as in the quickstart": ablation(),
        "no pretraining, all trained": ablation("student.checkpoint={untrained}", "student.frozen=()"),
        "no translations": ablation("student.checkpoint={monolingual_text}"),
        "teacher like student": ablation("teacher.checkpoint=mini-bert-multilingual"),
        "no unlabelled text": ablation("task.unlabelled_from=none", "task.unlabelled=0"),
    }
    variants |= {f"T = {value}": ablation(f"transfer.temperature={value}") for value in ("0.1", "2.0")}
    variants |= {f"{count} labels": ablation(f"task.labelled={count}") for count in (64, 256, 512, 2000)}
    return Study(
        base=QUICKSTART,
        variants=variants,
        pretrained={
            **{f"en_{seed}": (f"{PRETRAINING}:english", (f"seed={seed}",)) for seed in (1, 2)},
            **{f"multi_{seed}": (f"{PRETRAINING}:multilingual", (f"seed={seed}",)) for seed in (1, 2)},
            "untrained": (f"{PRETRAINING}:multilingual", ("steps=1", "learning_rate=0.0")),
            "monolingual_text": (f"{PRETRAINING}:multilingual", ("pair_fraction=0.0",)),
        },
    )
