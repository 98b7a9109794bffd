"""The benchmark command: measure training, labelling, prediction, and tokenising on this machine."""
