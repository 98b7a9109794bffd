"""Distillation: objectives, the transfer set, labelling with a teacher, and the logits store."""
