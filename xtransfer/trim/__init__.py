"""The trim command: keep only the pieces of a vocabulary that given text needs."""
