"""The built-in model sources."""
