"""A WMTP plugin to start from."""
