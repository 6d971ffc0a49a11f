"""Files, overlays, --set and ${env:}: what wins, and where a message points."""

import os
import re
import subprocess
import sys

import pytest

from wmtp.config.load import load, load_config
from wmtp.config.overrides import parse_override
from wmtp.config.sources import Document
from wmtp.config.toml_file import FileSource
from wmtp.errors import ConfigError

GOOD = """\
[models.base]
type = "scratch"
vocab_size = 300
[datasets.py]
type = "python-source"
[trainer]
type = "baseline-mtp"
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def problems(*files, sets=()):
    with pytest.raises(ConfigError) as caught:
        load_config(files, sets)
    return list(caught.value.problems)


LINES = """\
# comment
[run]
tags = [
  "a",
  # in between

  "b",
]
name = '''
x
y'''

output_dir.deep = 1
"quoted.key" = { a = 1, b = [ { c = 2 } ] }

[a.b."c d"]
e = 1
[[list]]
x = 1
[[list]]

x = 2
y.z = 3
[last]"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("run",), 2),
        (("run", "tags"), 3),
        (("run", "tags", 1), 3),
        (("run", "name"), 9),
        (("run", "output_dir", "deep"), 13),
        (("run", "quoted.key", "b", 0, "c"), 14),
        (("a",), 16),
        (("a", "b", "c d", "e"), 17),
        (("list", 0, "x"), 19),
        (("list", 1), 20),
        (("list", 1, "x"), 22),
        (("list", 1, "y", "z"), 23),
        (("list", 1, "missing"), 20),
        (("last",), 24),
    ],
)
def test_the_line_of_every_sort_of_statement(path, line):
    assert FileSource(write("a.toml", LINES)).where(path) == f"a.toml:{line}"


def test_lines_are_found_in_a_long_file_and_with_windows_line_ends():
    text = "\r\n".join(f"[t{i}]\r\nx = [\r\n{i},\r\n]" for i in range(300))
    with open("long.toml", "wb") as file:
        file.write(text.encode())
    source = FileSource("long.toml")
    assert [source.where((f"t{i}", "x")) for i in (0, 150, 299)] == ["long.toml:2", "long.toml:602", "long.toml:1198"]


def test_the_file_that_set_the_value_last_is_named():
    write("a.toml", GOOD + "[train]\nmax_steps = 1\nlog_interval = 0\n")
    write("b.toml", "\n[train]\nmax_steps = 0\n")
    assert problems("a.toml", "b.toml", sets=["optimizer.lr=0"]) == [
        "--set optimizer.lr: must be > 0.0, not 0.0",
        "b.toml:3: train.max_steps: must be >= 1, not 0",
        "a.toml:10: train.log_interval: must be >= 1, not 0",
    ]


def test_a_missing_key_points_at_its_table():
    write("a.toml", GOOD.replace("vocab_size = 300\n", ""))
    assert problems("a.toml") == ["a.toml:1: models.base.vocab_size: required, and missing"]
    write("a.toml", "[train]\n")
    assert "a.toml: models: required, and missing" in problems("a.toml")


def test_an_unknown_component_points_at_its_type():
    write("a.toml", GOOD.replace("baseline-mtp", "basline-mtp"))
    assert problems("a.toml")[0].startswith("a.toml:7: trainer: no plugin provides 'basline-mtp'; did you mean 'baseline-mtp'?")


def test_tables_merge_and_arrays_are_replaced():
    write("a.toml", GOOD + '[run]\ntags = ["a", "b"]\nseed = 1\n')
    write("b.toml", '[run]\ntags = ["c"]\n')
    config = load_config(["a.toml", "b.toml"])
    assert (config.run.tags, config.run.seed) == (("c",), 1)


def test_a_new_type_drops_the_keys_of_the_old_one():
    write("a.toml", GOOD + '[optimizer]\ntype = "adamw"\nlr = 0.5\neps = 0.1\n[models.base.heads]\nhorizon = 2\n')
    write("b.toml", '[optimizer]\ntype = "muon"\nmomentum = 0.5\n')
    optimizer = load_config(["a.toml", "b.toml"]).optimizer
    assert (optimizer.type, optimizer.momentum, optimizer.lr) == ("muon", 0.5, 2e-5)


def drops(*files, sets=()):
    return list(load(files, sets).document.drops())


def test_what_a_new_type_drops_is_said_once_nothing_sets_it_again():
    write("a.toml", GOOD + '[optimizer]\ntype = "adamw"\nlr = 0.5\neps = 0.1\n[models.base.heads]\nhorizon = 2\n')
    write("b.toml", '[optimizer]\ntype = "muon"\nmomentum = 0.5\n')
    assert drops("a.toml", "b.toml") == [
        "b.toml:2: optimizer.type: 'muon' in place of 'adamw' drops eps, lr; set them again where still meant"
    ]
    assert drops("a.toml", "b.toml", sets=["optimizer.lr=0.1"]) == [
        "b.toml:2: optimizer.type: 'muon' in place of 'adamw' drops eps; set it again where still meant"
    ]
    assert drops("a.toml", sets=["optimizer.type=muon"])[0].startswith("--set optimizer.type: 'muon' in place of")
    assert drops("a.toml", sets=["optimizer.type=adamw"]) == []
    assert drops("a.toml", sets=["models.base.type=hf", "models.base.uri=x"]) == [
        "--set models.base.type: 'hf' in place of 'scratch' drops vocab_size; set it again where still meant"
    ]


def test_a_key_missing_because_a_new_type_dropped_it_says_so():
    write("a.toml", GOOD.replace('type = "python-source"', 'type = "text"\nuri = "/data"'))
    assert problems("a.toml", sets=["datasets.py.type=jsonl"]) == [
        "--set datasets.py.type: datasets.py.uri: required, and missing; that of 'text' was dropped with its type: set it again"
    ]


def test_a_new_type_keeps_heads_and_what_plain_sections_have():
    write("a.toml", GOOD + '[models.base.heads]\nhorizon = 2\n[schedule]\ntype = "linear"\nwarmup_steps = 7\n')
    config = load_config("a.toml", ["models.base.type=hf", "models.base.uri=x", "schedule.type=cosine"])
    assert config.models["base"].heads.horizon == 2
    assert config.models["base"].loader.type == "hf"
    assert config.schedule.warmup_steps == 7


def test_a_type_set_later_never_hides_another_set():
    write("a.toml", GOOD + '[optimizer]\ntype = "adamw"\n')
    assert load_config("a.toml", ["optimizer.momentum=0.5", "optimizer.type=muon"]).optimizer.momentum == 0.5
    found = problems("a.toml", sets=["optimizer.betas=[0.1, 0.2]", "optimizer.momentun=0.5", "optimizer.type=muon"])
    assert found == ["--set optimizer.momentun: unknown key; did you mean 'momentum'?"]


def test_one_file_gives_the_uri_and_another_the_type():
    write("place.toml", '[models.base]\nuri = "/m"\n')
    write("a.toml", GOOD.replace('type = "scratch"\nvocab_size = 300', 'type = "hf"'))
    assert load_config(["place.toml", "a.toml"]).models["base"].loader.uri == "/m"
    assert load_config(["a.toml", "place.toml"]).models["base"].loader.uri == "/m"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=1", ("a", "b"), 1),
        ("a=1e-5", ("a",), 1e-5),
        ("a=word", ("a",), "word"),
        ("a=/data/x=y", ("a",), "/data/x=y"),
        ("a=two words", ("a",), "two words"),
        ('a="1"', ("a",), "1"),
        ("a=", ("a",), ""),
        ("a=[1, 2]", ("a",), [1, 2]),
        ('a={b = "c"}', ("a",), {"b": "c"}),
        ("a=1#2", ("a",), "1#2"),
        ("a=1,2", ("a",), "1,2"),
        ("a=1\nb=2", ("a",), "1\nb=2"),
        ("a=2026-01-02", ("a",), "2026-01-02"),
        ('datasets."my.set".uri=x', ("datasets", "my.set", "uri"), "x"),
        ('"a=b".c=1', ("a=b", "c"), 1),
        ("a=true", ("a",), True),
        ("a = 5", ("a",), 5),
    ],
)
def test_override_values(text, path, value):
    override = parse_override(text)
    assert (override.path, override.value) == (path, value)
    assert type(override.value) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.max_steps", "--set train.max_steps: has no value; write --set train.max_steps=VALUE"),
        ("a b=1", "--set a b=1: 'a b' is no key; write it with dots, as in trainer.type=NAME"),
        ("run.tags=\udce9", "--set 'run.tags=\\udce9': is not UTF-8 text, which a config is; set the terminal to UTF-8"),
        ("=1", "--set =1: '' is no key; write it with dots, as in trainer.type=NAME"),
        ("a..b=1", "--set a..b=1: 'a..b' is no key; write it with dots, as in trainer.type=NAME"),
        (
            "tr\u0430in.lr=1",
            "--set tr\u0430in.lr=1: 'tr\u0430in.lr' is no key; write it with dots, as in trainer.type=NAME;"
            " '\u0430' is CYRILLIC SMALL LETTER A",
        ),
    ],
)
def test_override_mistakes(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert str(caught.value) == message


def test_override_of_a_broken_array():
    with pytest.raises(ConfigError, match=r"--set a=\[1: the value is not TOML: "):
        parse_override("a=[1")


def test_overrides_reach_into_arrays():
    document = Document()
    document.merge(
        {"eval": [{"type": "a", "x": 1}, {"type": "b"}], "run": {"tags": ["p", "q"]}}, FileSource(write("e.toml", ""))
    )
    for text in ("eval.0.x=2", "eval.1={type = 'c'}", "eval.2.type=d", "run.tags.1=r", "new.deep.key=1"):
        document.override(parse_override(text))
    assert document.data == {
        "eval": [{"type": "a", "x": 2}, {"type": "c"}, {"type": "d"}],
        "run": {"tags": ["p", "r"]},
        "new": {"deep": {"key": 1}},
    }
    with pytest.raises(ConfigError, match=r"eval is an array of 3; write an index of 0 to 3 in place of '5'"):
        document.override(parse_override("eval.5.x=1"))


def test_an_override_makes_the_first_element_of_eval():
    assert problems(write("a.toml", GOOD), sets=["eval.0.type=nothing-like-it"])[0].startswith(
        "--set eval.0.type: eval.0: no plugin provides 'nothing-like-it'"
    )


def test_environment(monkeypatch):
    monkeypatch.setenv("ROOT", "/data")
    monkeypatch.delenv("UNSET", raising=False)
    write("a.toml", GOOD + '[run]\nname = "${env:ROOT}-${env:UNSET:d:e}"\noutput_dir = "$${env:ROOT}"\n')
    run = load_config("a.toml").run
    assert (run.name, run.output_dir) == ("/data-d:e", "${env:ROOT}")


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "MY_APIKEY", "CREDENTIALS"])
def test_a_secret_does_not_come_in_by_its_variable(monkeypatch, name):
    monkeypatch.setenv(name, "harmless-looking")
    write("a.toml", GOOD + f'[run]\ntags = ["${{env:{name}}}", "${{env:{name}:default}}"]\n')
    found = problems("a.toml")
    assert len(found) == 2
    assert all(f"'{name}' names a secret, which would be saved with the run" in problem for problem in found)
    assert "harmless-looking" not in str(found)


def test_variables_that_only_sound_like_secrets(monkeypatch):
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "AWS_ACCESS_KEY_ID", "TOKENIZER"):
        monkeypatch.setenv(name, "x")
        write("a.toml", GOOD + f'[run]\nname = "${{env:{name}}}"\n')
        assert load_config("a.toml").run.name == "x"


def test_environment_mistakes_come_with_all_the_others():
    write("a.toml", GOOD + '[run]\nname = "${env:UNSET}"\ntags = ["${env:}", "${env:A:{x}}", "${env:"]\nseed = -1\n')
    found = problems("a.toml")
    assert found == [
        "a.toml:9: run.name: environment variable 'UNSET' is not set; set it, or write ${env:UNSET:VALUE} with a default",
        "a.toml:10: run.tags.0: '' is no name of an environment variable, in ${env:}",
        "a.toml:10: run.tags.1: '${env:' without its '}', or one inside another",
        "a.toml:10: run.tags.2: '${env:' without its '}', or one inside another",
        "a.toml:11: run.seed: must be >= 0, not -1",
    ]


def test_files_that_cannot_be_read(tmp_path):
    write("broken.toml", 'a = 1\nb = "x\n')
    with open("latin.toml", "wb") as file:
        file.write(b"# one\n# caf\xe9\n")
    with open("wide.toml", "wb") as file:
        file.write("a = 1".encode("utf-16"))
    found = problems("none.toml", str(tmp_path), "broken.toml", "latin.toml", "wide.toml")
    assert found[0] == f"none.toml: there is no such file; the current directory is {tmp_path}"
    assert found[1].startswith(f"{tmp_path}: is a directory; name a TOML file; a recipe is")
    assert found[2].startswith("broken.toml:2: this is not TOML: ")
    assert found[3] == "latin.toml:2: is not UTF-8 text; save the file as UTF-8"
    assert found[4] == "wide.toml:1: is not UTF-8 text; it looks like UTF-16; save the file as UTF-8"


def test_a_byte_order_mark_is_no_mistake():
    write("a.toml", "\ufeff" + GOOD)
    assert load_config("a.toml").trainer.type == "baseline-mtp"


def test_a_duplicate_key_names_its_line():
    assert problems(write("a.toml", "[run]\nseed = 1\nseed = 2\n"))[0].startswith("a.toml:3: this is not TOML: ")


def test_nothing_heavy_is_imported():
    write("a.toml", GOOD)
    code = (
        "import sys, wmtp; from wmtp.cli import main; assert main(['check', 'a.toml']) == 0;"
        "print([m for m in ('torch', 'transformers', 'mlflow', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    light = "import sys, wmtp; print([m for m in ('attrs', 'cattrs', 'pluggy', 'tomli', 'argparse') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("m\u0430x_steps = 1", "; '\u0430' is CYRILLIC SMALL LETTER A"),
        ("max_steps\u00a0= 1", "; '\\xa0' is NO-BREAK SPACE"),
        ("max_steps = \u201c1\u201d", "; '\u201c' is LEFT DOUBLE QUOTATION MARK"),
        ("max_steps 1", ""),
    ],
)
def test_a_character_that_only_looks_like_another_is_named(line, said):
    write("a.toml", f"[train]\n{line}\n")
    (problem,) = problems("a.toml")
    assert re.fullmatch(r"a\.toml:2: this is not TOML: .* \(column \d+\)" + re.escape(said), problem)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("amp = True", "; write true"),
        ("x = None", "; TOML has no such value: leave the key out"),
        ("x = .5", "; write 0.5"),
        ("x = base-line/mtp", '; a text has quotes: "base-line/mtp"'),
        ("x = [a]", '; a text has quotes: "a"'),
        ('x = "C:\\Users"', "; in \"…\" a backslash begins an escape; write '…', or / in a path"),
        ('x = "C:\\data"', "; in \"…\" a backslash begins an escape; write '…', or / in a path"),
        ("x = 1\nx = 2", "; it is in the file already: leave one out"),
        ("[train]", "; it is in the file already: leave one out"),
        ("x = ", ""),
    ],
)
def test_what_other_languages_write_is_answered_with_toml(line, said):
    write("a.toml", f"[train]\n{line}\n")
    (problem,) = problems("a.toml")
    assert re.fullmatch(r"a\.toml:[23]: this is not TOML: .* \(column \d+\)" + re.escape(said), problem)
