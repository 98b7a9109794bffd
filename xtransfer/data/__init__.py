"""Tasks: their examples, splits, and labels, and how subsets are sampled."""
