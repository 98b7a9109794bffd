"""The embedded SYNTHETIC task `minireviews`: its generator, its language files, and its TFDS builder."""
