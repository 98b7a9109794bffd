"""Batches: packing, order, prefetching, and how full they are."""
