"""The TFDS builder of the SYNTHETIC task `minireviews`, which needs neither TensorFlow nor the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from xtransfer.data.corpora.minireviews import generator

PRETRAINING = "-pretraining"
_DESCRIPTION = """
SYNTHETIC product reviews (books, dvd, music; negative or positive) in English, German, French and Japanese, written by
a seeded generator of this project, with 2 % label noise and 1 % typos. The configs named after a language pair hold
translation pairs of single sentences without labels, for pretraining only, and so do the reviews of the configs
"<language>-pretraining". License: Apache-2.0.
"""


def config_names() -> tuple[str, ...]:
    """Return the names of all builder configs."""
    return (*generator.LANGUAGES, *(name + PRETRAINING for name in generator.LANGUAGES), *generator.PAIRS)


def _config(name: str) -> tfds.core.BuilderConfig:
    if name in generator.PAIRS:
        return tfds.core.BuilderConfig(name=name, description=f"SYNTHETIC translation pairs {name}")
    return tfds.core.BuilderConfig(name=name, description=f"SYNTHETIC reviews {name}")


class MiniReviews(tfds.core.GeneratorBasedBuilder):
    """The embedded reviews. A language has train, dev, test, and unlabelled; a pair of languages has parallel text."""

    name = "minireviews"
    # TFDS looks for download checksums beside the code. There are none, and the search needs another package.
    code_path = None
    VERSION = tfds.core.Version(generator.VERSION)
    RELEASE_NOTES = {generator.VERSION: "First version."}
    BUILDER_CONFIGS = [_config(name) for name in config_names()]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features: dict[str, Any]
        if self.builder_config.name in generator.PAIRS:
            features = {"text": text, "text_pair": tfds.features.Text()}
        else:
            features = {"id": tfds.features.Text(), "text": text, "domain": tfds.features.Text()}
            if not self.builder_config.name.endswith(PRETRAINING):
                features["label"] = np.int64
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            license="Apache-2.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        name = self.builder_config.name
        if name in generator.PAIRS:
            return {"parallel": self._generate_examples(name, "parallel")}
        language, dash, _ = name.partition("-")
        splits = ["pretraining"] if dash else ["train", "dev", "test", "unlabelled"]
        return {split: self._generate_examples(language, split) for split in splits}

    def _generate_examples(self, name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        if split == "parallel":
            for index, (text, text_pair) in enumerate(generator.parallel(name)):
                yield index, {"text": text, "text_pair": text_pair}
            return
        for index, review in enumerate(generator.reviews(name, split)):
            row = {"id": f"{index:05d}", "text": review.text, "domain": review.domain, "label": review.label}
            if split == "pretraining":
                del row["label"]
            yield index, row
