"""The report command: tables and plots of results, and the table writer that other commands share."""
