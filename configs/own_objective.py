"""An objective of your own, beside two of the paper's: the quickstart's data with a mix of labels and teacher logits.

python -m xtransfer.main --config configs/own_objective.py --workdir runs/own-objective

`config.objective.NAME` defines it here, and flags change it, such as `--config.objective.labels_and_kd.hard_weight=1`.

Measured with `--config.seeds="(0,)"`: accuracy in %. One seed does not show which of the last two is better.

objective       en (source)  average of de, fr, ja   gain over vanilla
vanilla         87.5         85.6
monox_kd        93.7         93.0                    +7.4
labels_and_kd   93.5         93.5                    +8.0
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Return the config: the quickstart's, with `vanilla`, `monox_kd`, and the objective `labels_and_kd`."""
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()

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
