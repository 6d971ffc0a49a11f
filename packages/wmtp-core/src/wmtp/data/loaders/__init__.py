"""The built-in data sources, one file each."""
