"""A second hop: the quickstart's student labels unlabelled German text, from which another encoder learns.

python -m xtransfer.main --config configs/second_hop.py --workdir runs/second-hop

`hop_de` trains an encoder of its own on German text alone (Guo et al., "FreeTransfer-X: Safe and Label-Free
Cross-Lingual Transfer from Off-the-Shelf Models", Findings of NAACL 2022). `again` trains the student once more, on
text in all target languages. Both use target text, and every table says so: these numbers are not zero-shot without it.

Measured with `--config.seeds="(0,)"`: accuracy in %. One seed does not show whether `again` is better than its teacher.

objective                  en (source)   de     average of de, fr, ja
vanilla                    87.5          87.0   85.6
monox_kd                   93.7          93.5   93.0
again (uses target text)   92.9          93.1   93.3
hop_de (uses target text)                93.3
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Return the config: the quickstart's, with `vanilla`, `monox_kd`, and two objectives on target text."""
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.task.target_text = 2000  # of each target language

    # An encoder of your own goes here, such as {"checkpoint": "a German one"}. It need not know the source language.
    config.students.german = {"checkpoint": "mini-bert-multilingual"}
    config.objective.hop_de = {
        "base": "self_training",
        "teacher": "monox_kd",
        "data": "target",
        "languages": ("de",),
        "student": "german",
    }
    config.objective.again = {"base": "self_training", "teacher": "monox_kd", "data": "target"}
    config.objectives = ("vanilla", "monox_kd", "hop_de", "again")
    return config
