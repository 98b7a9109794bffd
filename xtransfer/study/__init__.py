"""The study command: run variants of an experiment on several samples, and compare them."""
