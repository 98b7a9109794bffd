"""Batches: packing, order, prefetching, and measures."""
