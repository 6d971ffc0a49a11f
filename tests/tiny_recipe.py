"""A recipe as small as can be, for tests that need some config."""

from typing import Any

#: a model of some thousand parameters
TINY_MODEL = {
    "type": "scratch",
    "vocab_size": 258,
    "hidden_size": 16,
    "layers": 1,
    "attention_heads": 2,
    "intermediate_size": 24,
    "max_positions": 128,
}

#: the shortest recipe that `wmtp check` accepts
SHORTEST_TOML = """\
[models.base]
type = "scratch"
vocab_size = 258
[tokenizer]
type = "bytes"
[datasets.py]
type = "python-source"
[trainer]
type = "baseline-mtp"
"""


def tiny_recipe(uri: str = "code.jsonl", **tables: Any) -> dict[str, Any]:
    """Make a recipe of one step on the data at ``uri``; ``tables`` take the place of its own."""
    return {
        "models": {"base": TINY_MODEL},
        "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "jsonl", "uri": uri}},
        "data": {"train": {"max_length": 32, "batch_size": 2}},
        "trainer": {"type": "baseline-mtp"},
        "train": {"max_steps": 1},
        "tracker": {"type": "jsonl"},
    } | tables
