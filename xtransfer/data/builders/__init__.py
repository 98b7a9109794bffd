"""TFDS builders of the tasks that the project brings along."""
