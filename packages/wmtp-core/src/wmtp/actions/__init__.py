"""Functions behind the commands other than ``run`` and ``start``.

``wmtp.*`` offers them, and the command line prints what they return.
"""
