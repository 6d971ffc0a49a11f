"""Examples read from small files, good ones and bad ones."""

import gzip
import json

from wmtp.data.base import BadExample


def packed(content):
    """gzip, without the time: it would be in the names of tests, which all processes must agree on."""
    return gzip.compress(content, mtime=0)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(config, path):
    return list(config.build().examples(path))


def good(config, path):
    found = read(config, path)
    assert not [example for example in found if isinstance(example, BadExample)]
    return found


def bad(config, path):
    (found,) = read(config, path)
    assert isinstance(found, BadExample)
    return str(found)
