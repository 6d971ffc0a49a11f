"""The documentation holds: its configs pass, its code runs, its messages are real, its links lead somewhere."""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, environment

from wmtp.cli import _parse, main
from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.data.base import Example
from wmtp.errors import ConfigError
from wmtp.studies.config import load_study
from wmtp.studies.plan import make_plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [*sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("examples/*/README.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

#: what a fragment in the docs is laid over
BASE = """
[models.base]
type = "scratch"
vocab_size = 258
hidden_size = 32
layers = 2
attention_heads = 2
intermediate_size = 48
max_positions = 2048

[models.base.heads]
horizon = 3

[tokenizer]
type = "bytes"

[datasets.code]
type = "jsonl"
uri = "train.jsonl"

[data.train]
max_length = 64
batch_size = 4

[trainer]
type = "baseline-mtp"

[optimizer]
lr = 3e-3

[train]
max_steps = 3

[tracker]
type = "jsonl"
"""


def page_id(path):
    return path.relative_to(ROOT).as_posix() if isinstance(path, Path) else str(path)


def blocks(language, pages=PAGES):
    """Every block of a language: page and line, the mark before it, and its text."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("text")) + 1
                yield pytest.param(match["mark"] or "", match["text"], id=f"{page_id(page)}:{line}")


def environment_of(text, monkeypatch):
    for name in re.findall(r"\$\{env:(\w+)\}", text):
        monkeypatch.setenv(name, f"data/{name.lower()}")


def make_inputs(value):
    """Every local ``uri`` in a config exists: what `check` asks for."""
    if isinstance(value, dict):
        for key, element in value.items():
            if key == "chat_template":
                Path(element).write_text("{{ messages }}")
            if key == "uri" and "://" not in element:
                path = Path(re.sub(r"\$\{env:(\w+)(?::([^}]*))?\}", lambda m: os.environ.get(m[1], m[2]), element))
                is_model = value.get("type") == "hf" and path.suffix != ".gguf"
                if path.suffix and not is_model:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) if path.suffix == ".gguf" else b"")
                else:
                    path.mkdir(parents=True, exist_ok=True)
                    if is_model:
                        (path / "config.json").write_text('{"model_type": "llama"}')
            make_inputs(element)


@pytest.fixture
def empty_files(monkeypatch):
    """The inputs of a config are there, and hold nothing."""
    monkeypatch.setattr("wmtp.config.rules.check_first_examples", lambda config: ())


@pytest.mark.usefixtures("empty_files")
@pytest.mark.parametrize(("mark", "text"), blocks("toml"))
def test_every_toml_block_is_a_config_or_a_part_of_one(mark, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment_of(text, monkeypatch)
    mapping = tomllib.loads(text)
    if mark.startswith("file: "):
        return  # the tutorial's files have a test of their own
    if mark == "study":
        Path("train.jsonl").touch()
        measured = {"data": {"eval": {"holdout": 0.1}}}  # which every metric of the blocks is of
        make_plan(load_study(mapping), [tomllib.loads(BASE), measured])
        return
    Path("train.jsonl").touch()
    make_inputs(mapping)
    if mark == "fragment":
        # a fragment shows what can stand in these tables, not what else the recipe has to change with it
        base = tomllib.loads(BASE)
        base["data"]["train"]["max_length"] = 1024
        base["train"]["max_steps"] = 1000
        if "type" not in mapping.get("tokenizer", {"type": "another"}):
            base["tokenizer"] = {"type": "own"}  # a key of the model's own tokenizer
        sources = [base, mapping]
    else:
        assert "models" in mapping, "a block that is no complete config needs <!-- fragment --> before it"
        sources = [mapping]
    try:
        check_loaded(load(sources))
    except ConfigError as error:
        if all("pip install" in problem for problem in error.problems):
            pytest.skip(str(error))  # a package of an extra is not installed
        raise


@pytest.mark.usefixtures("empty_files")
@pytest.mark.parametrize("path", [*(ROOT / "examples").rglob("*.toml"), *(ROOT / "configs").rglob("*.toml")], ids=page_id)
def test_every_config_file_passes(path, tmp_path, monkeypatch):
    text = path.read_text(encoding="utf-8")
    if path.name == "pyproject.toml" or 'type = "loss-truncation"' in text:
        return  # the example plugin is installed and run by check_wheels.py
    monkeypatch.chdir(tmp_path)
    environment_of(text, monkeypatch)
    make_inputs(tomllib.loads(text))
    sources = [path]
    if "study" in tomllib.loads(text):
        make_plan(load_study(path), [])
        return
    if path.parent.name == "recipes":
        baseline = path.parent / "baseline.toml"  # the others change its trainer
        environment_of(baseline.read_text(encoding="utf-8"), monkeypatch)
        make_inputs(tomllib.loads(baseline.read_text(encoding="utf-8")))
        sources = [ROOT / "configs" / "local.toml", baseline, path]
    elif path.parent.name == "production":
        shared = path.parent / "llama-7b.toml"
        sources = [shared, path.parent / "baseline.toml" if path == shared else path]
    elif path.parent.name == "configs":
        Path("train.jsonl").touch()
        sources = [path, tomllib.loads(BASE)]
    check_loaded(load(sources))


@pytest.mark.parametrize(("mark", "text"), blocks("python"))
def test_every_python_block_compiles_and_runs_where_it_says_so(mark, text):
    code = compile(text, "block", "exec")
    if mark == "run":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, {"__name__": "block"})


@pytest.mark.parametrize(("mark", "text"), blocks("python"))
def test_every_python_block_needs_one_import_line(mark, text):
    """All that the docs use of WMTP comes from ``wmtp`` itself; a second line is for type hints alone."""
    modules = []
    for node in ast.parse(text).body:
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
    assert [module for module in modules if module.split(".")[0] == "wmtp"] in ([], ["wmtp"])


def sections(page):
    """The text below each heading of the third level."""
    parts = re.split(r"^### (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("loader", ["jsonl", "chat", "mbpp", "code-contests", "humaneval", "python-source"])
def test_the_sample_of_every_loader_is_read(loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(BLOCK.finditer(sections(ROOT / "docs" / "data.md")[f"`{loader}`"]))
    mapping = tomllib.loads(found[0]["text"])
    (sample,) = [match for match in found if match["language"] in ("jsonl", "python")]
    (source,) = mapping["datasets"].values()
    path = Path(source["uri"])
    if not path.suffix:
        path = path / {"python": "sample.py", "jsonl": "train.jsonl"}[sample["language"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sample["text"], encoding="utf-8")
    Path("train.jsonl").touch()
    (component,) = [c for name, c in load([tomllib.loads(BASE), mapping]).config.datasets.items() if name != "code"]
    examples = list(component.build().examples(Path(source["uri"]).resolve()))
    assert examples
    assert all(isinstance(example, Example) for example in examples), examples
    assert all(example.completion or example.messages for example in examples)


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=page_id)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name == "docs" and page.name != "index.md"], ids=page_id
)
def test_the_index_and_the_readme_name_every_page(page):
    assert f"]({page.name})" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["config.md", "hooks.md", "api.md"])
def test_the_references_are_up_to_date(name):
    pages = {path.name: text for path, text in generator().pages().items()}
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == pages[name], "run: uv run python docs/generate.py"


def test_every_hook_has_a_kind_and_so_a_place_in_the_reference():
    from wmtp.plugins import hookspecs
    from wmtp.plugins.components import KINDS

    assert {name for name in vars(hookspecs) if name.startswith("wmtp_")} == {f"wmtp_{kind}" for kind in KINDS}


def test_the_config_reference_has_every_section():
    from attrs import fields, has

    from wmtp.config.schema import Config
    from wmtp.plugins.components import COMPONENT_KIND

    module = generator()
    covered = {cls.__name__ for cls in module.SECTIONS.values()}

    def walk(cls):
        for attribute in fields(cls):
            kind = attribute.metadata.get(COMPONENT_KIND)
            if kind is not None:
                assert kind in module.TABLES or kind == "evaluators", kind
                continue
            names = re.findall(r"\w+Config\b", str(attribute.type))
            for name in names:
                assert name in covered, name
            for inner in module.SECTIONS.values():
                if inner.__name__ in names and has(inner):
                    walk(inner)

    walk(Config)


def commands():
    """Every ``wmtp …`` in a block of shell commands or between backquotes."""
    for page in [*PAGES, *OTHER_PAGES]:
        text = page.read_text(encoding="utf-8")
        lines = [line for match in BLOCK.finditer(text) if match["language"] == "sh" for line in match["text"].splitlines()]
        lines += re.findall(r"^ {4}(wmtp .*)$", text, flags=re.MULTILINE)
        lines += re.findall(r"`((?:uv run )?wmtp [^`\n]*)`", text)
        for line in lines:
            for part in re.split(r"&&", line):
                words = shlex.split(part, comments=True)
                if "wmtp" in words:
                    yield pytest.param(words[words.index("wmtp") + 1 :], id=f"{page_id(page)}: {part.strip()}")


@pytest.mark.parametrize("words", commands())
def test_every_command_is_one(words, capsys):
    if words == ["launch", "--dry-run"]:  # named in a sentence, without its files
        words = [*words, "recipe.toml"]
    elif len(words) == 1:  # likewise: that there is such a command is all it says
        words = [*words, "--help"]
    try:
        _parse(words)
    except SystemExit as stop:  # --help stops too
        if stop.code:
            pytest.fail(capsys.readouterr().err)


def messages():
    for block in blocks("text", [ROOT / "docs" / "troubleshooting.md"]):
        mark, text = block.values
        assert mark.startswith("provoke: "), f"{block.id} does not say what gives this message"
        yield pytest.param(shlex.split(mark.removeprefix("provoke: ")), text, id=mark)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The folder in which the messages of troubleshooting.md appear."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Path("train.jsonl").open("w") as file:
        for i in range(60):
            lines = "\n".join(f"    x{j} = {i * j % 17}" for j in range(i % 7 + 1))
            file.write(json.dumps({"id": f"f{i}", "prompt": f"def f{i}():\n", "completion": lines}) + "\n")
    Path("recipe.toml").write_text(BASE + "[data.eval]\nholdout = 0.2\n")
    shape = 'type = "scratch"\nvocab_size = 258\nhidden_size = 32\nlayers = 2\nattention_heads = 2\n'
    for name, architecture in (("bloom", 'architecture = "bloom"\n'),
                               ("encoder", 'architecture = "t5"\n')):  # fmt: skip
        Path(f"{name}.toml").write_text(re.sub(r"\[models.base\]\n.*?\n\n", f"[models.base]\n{shape}{architecture}\n", BASE,
                                               count=1, flags=re.DOTALL))  # fmt: skip
    Path("broken.jsonl").write_text('{"text": "abc"}\n{"prompt": "a", "completion": \n{"prompt": "a"}\n')
    Path("short.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    return tmp_path


@pytest.mark.parametrize(("words", "text"), messages())
def test_every_message_is_what_the_command_says(words, text, project, capsys, monkeypatch):
    while "=" in words[0]:  # as a shell takes NAME=VALUE before a command
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if "first" in words:
        assert main(["run", "recipe.toml", "--run-name", "first"]) == 0
        capsys.readouterr()
    assert main(words) in (1, 2)
    said = capsys.readouterr().err.replace(str(project), "/home/me/project")
    errors = "".join(line for line in said.splitlines(keepends=True) if line.startswith("error: "))
    expected = ".*".join(re.escape(part) for part in text.split("…"))
    assert errors == text or re.fullmatch(expected, errors), errors


def test_the_tutorial_gives_the_example_plugin(preloaded, tmp_path):
    """Its files are those of examples/wmtp-example; installed as pip would, they are listed, checked, and pass their tests."""
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    example = ROOT / "examples" / "wmtp-example"
    files = {}
    for match in BLOCK.finditer(text):
        if (match["mark"] or "").startswith("file: "):
            files[match["mark"].removeprefix("file: ")] = match["text"]
    there = {path.relative_to(example).as_posix() for path in example.rglob("*.*") if "__pycache__" not in path.parts}
    assert files.keys() == {name for name in there if Path(name).suffix in (".py", ".toml")}
    for name, content in files.items():
        assert content == (example / name).read_text(encoding="utf-8"), name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "src" / "wmtp_example-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (installed / "entry_points.txt").write_text("[wmtp]\n" + "".join(
        f"{name} = {module}\n" for name, module in project["entry-points"]["wmtp"].items()))  # fmt: skip
    variables = environment() | {"PYTHONPATH": str(tmp_path / "src")}

    def run(*arguments):
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    expected = next(match["text"] for match in BLOCK.finditer(text) if match["text"].startswith("wmtp-example"))
    assert expected in run("wmtp", "plugins")
    assert "drop = 0.1" in run("wmtp", "show", "loss-truncation")
    run("wmtp", "check", "example.toml")
    of_plugin = f"import sys\nsys.path.insert(0, {str(tmp_path / 'src')!r})\nimport pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    tested = preloaded.run("-q", "-p", "no:cacheprovider", "tests", code=of_plugin, cwd=tmp_path, env=variables)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert " passed" in tested.stdout
