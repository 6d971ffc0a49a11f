"""Run directories: their files, records and results."""
