"""Command: tables and plots of results."""
