"""The report as one HTML page: its markup, its charts, its parts, and the records that they read."""
