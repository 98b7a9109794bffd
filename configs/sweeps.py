"""Two sweeps of the quickstart: the temperature, and the number of labels.

    python -m xtransfer.main --config configs/sweeps.py --workdir runs/temperatures \
        --sweep transfer.temperature=0.1,0.5,1,2,4
    python -m xtransfer.main --config configs/sweeps.py --workdir runs/labels \
        --sweep task.labelled=64,128,256,512,2000

Each point is the quickstart with `vanilla` and `monox_kd` on five labelled samples, each with its own teacher, so ± and
the intervals cover the sample that a user happens to have. The first sweep trains teachers and `vanilla` at its first
point only. `python -m xtransfer.report --workdir DIR` prints a table again, and DIR/report has its chart.

Measured at full length: not yet. README.md, under Sweeps, quotes shorter runs of such commands. The tables belong here,
from runs/temperatures/report/sweep.md and runs/labels/report/sweep.md, with the date, the commit, and the time.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Return the quickstart's config, with two objectives and five labelled samples."""
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.objectives = ("vanilla", "monox_kd")
    config.task.labelled_seeds = (0, 1, 2, 3, 4)
    config.seeds = (0,)
    return config
