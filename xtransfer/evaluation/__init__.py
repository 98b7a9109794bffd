"""Evaluation: the metrics, the evaluator that scores checkpoints, and aggregated results."""
