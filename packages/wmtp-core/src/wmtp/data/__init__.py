"""From files to batches of tokens."""

from wmtp.data.base import Example, ExampleLoader

__all__ = ["Example", "ExampleLoader"]
