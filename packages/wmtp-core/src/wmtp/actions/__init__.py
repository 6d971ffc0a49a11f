"""Functions behind the commands other than ``run`` and ``start``: what ``wmtp.*`` offers, and the command line prints."""
