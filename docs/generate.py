"""Writes the parts of the documentation that the code knows.

The references, and the table of architectures.

    uv run python docs/generate.py

It replaces the parts between markers in ``docs/config.md``, ``docs/hooks.md``, ``docs/api.md`` and
``docs/models.md``; ``tests/test_docs.py`` fails where they are out of date.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import attrs
import tomli_w

import wmtp
from wmtp.actions.components import type_name
from wmtp.config import schema
from wmtp.config.tree import plain_value
from wmtp.lazy import names_in_stub
from wmtp.plugins import Registry, hookspecs, load_plugins
from wmtp.plugins.components import COMPONENT_KIND, KINDS
from wmtp.plugins.contract import CONFIG_CLASSES, ComponentConfig, Contract

DOCS = Path(__file__).parent

#: the plain sections of a config: its table, and its class
SECTIONS = {
    "[run]": schema.RunConfig,
    "[models.NAME]": schema.ModelConfig,
    "[models.base.heads]": schema.HeadsConfig,
    "[models.base.lora]": schema.LoraConfig,
    "[data]": schema.DataConfig,
    "[data.train]": schema.TrainDataConfig,
    "[data.eval]": schema.EvalDataConfig,
    "[schedule]": schema.ScheduleConfig,
    "[train]": schema.TrainConfig,
    "[train.early_stopping]": schema.EarlyStoppingConfig,
    "[devices]": schema.DevicesConfig,
    "[devices.fp8]": schema.Fp8Config,
    "[devices.fsdp]": schema.FsdpConfig,
    "[checkpoints]": schema.CheckpointConfig,
    "[report]": schema.ReportConfig,
    "[storage]": schema.StorageConfig,
}

#: kind → where its components stand in TOML, and what that section is
TABLES = {
    "trainers": ("[trainer]", "the algorithm"),
    "model_loaders": ("[models.NAME]", "where a model comes from"),
    "tokenizers": ("[tokenizer]", "default: the base model's own"),
    "data_loaders": ("[datasets.NAME]", "the data sources, by names of your choice"),
    "optimizers": ("[optimizer]", 'default: `type = "adamw"`'),
    "trackers": ("[tracker]", 'default: `type = "mlflow"`'),
    "evaluators": ("[[eval]]", "one table for each measurement"),
    "launchers": ("[launcher]", 'default: `type = "local"`'),
    "storages": ("[storage.TYPE]", "the table's name; those without one have their defaults"),
}

#: kind → the class that `build` returns an instance of; optimizers are torch's own
CONTRACTS = {
    "trainers": ("wmtp.trainers", "Trainer"),
    "model_loaders": ("wmtp.models", "ModelLoader"),
    "tokenizers": ("wmtp.tokenizers", "Tokenizer"),
    "data_loaders": ("wmtp.data", "ExampleLoader"),
    "storages": ("wmtp.storage", "Storage"),
    "trackers": ("wmtp.tracking", "Tracker"),
    "evaluators": ("wmtp.evaluation", "Evaluator"),
    "launchers": ("wmtp.launchers", "Launcher"),
}

#: kind → contracts beside that one, for components that do more
FURTHER_CONTRACTS = {"launchers": ("RemoteLauncher",)}

#: kind → what the contract's methods are given, or give
VALUES = {
    "trainers": (
        *(
            "TrainerSetup",
            "HiddenView",
            "PredictionChunk",
            "StepView",
            "wmtp.data.batch.Batch",
            "wmtp.data.batch.Targets",
            "wmtp.data.batch.Document",
        ),
        *("Stage", "OpenModel", "RewardScores"),
    ),
    "model_loaders": ("ModelInfo", "LoadedModel"),
    "data_loaders": ("Example", "BadExample"),
    "trackers": ("RunInfo",),
    "evaluators": ("Measured", "Estimate"),
    "launchers": ("LaunchPlan", "RunStatus"),
}

#: whose components stand in the reference
OURS = ("wmtp-core", "wmtp-algos", "wmtp-storage", "wmtp-vessl")

#: heading → the modules whose public names stand below it; a name goes to the first that fits
API = {
    "Commands": ("wmtp.actions", "wmtp.api", "wmtp.runs", "wmtp.startup", "wmtp.evaluation.command", "wmtp.exporting"),
    "Configs": ("wmtp.config",),
    "Algorithms": ("wmtp.trainers", "wmtp_algos"),
    "Data": ("wmtp.data",),
    "Models and heads": ("wmtp.models", "wmtp.generation"),
    "Loss": ("wmtp.loss",),
    "Optimizers": ("wmtp.optim",),
    "Evaluation": ("wmtp.evaluation",),
    "Tokenizers": ("wmtp.tokenizers",),
    "Storage": ("wmtp.storage",),
    "Tracking": ("wmtp.tracking",),
    "Launchers": ("wmtp.launchers",),
    "Plugins": ("wmtp.plugins",),
    "Test suites for plugins": ("wmtp.testing",),
    "Errors": ("wmtp.errors",),
}

_BOUNDS = {">=": "≥", "<=": "≤", ">": ">", "<": "<"}


def config_reference(registry: Registry) -> str:
    """Every section and every component of our own packages, as Markdown."""
    parts = [f"### `{table}`\n\n{described(cls)}" for table, cls in SECTIONS.items()]
    for kind, (table, remark) in TABLES.items():
        parts.append(f"### {KINDS[kind].capitalize()}s: `{table}`\n\nChosen by `type`: {remark}.")
        for provided in registry.of_kind(kind):
            if provided.plugin is not None and provided.plugin.distribution in OURS:
                name = f"[storage.{provided.type}]" if kind == "storages" else f'type = "{provided.type}"'
                title = f"`{name}` ({KINDS[kind]} of {provided.plugin.distribution})"
                parts.append(f"#### {title}\n\n{described(provided.cls)}")
    return "\n\n".join(parts)


def described(cls: type[Any]) -> str:
    """A config class: what it is, and a table of its keys."""
    text, arguments = documentation(cls)
    attrs.resolve_types(cls)
    rows = []
    for attribute in attrs.fields(cls):
        if attribute.init:
            meaning = cell(arguments[attribute.name])
            rows.append(f"| `{attribute.alias}` | {shown_type(attribute)} | {shown_default(attribute)} | {meaning} |")
    if not rows:
        return f"{text}\n\nNo keys."
    return "\n".join([text, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def documentation(obj: Any) -> tuple[str, dict[str, str]]:
    """Return a docstring as Markdown without ``Args:``, and those by name.

    Every other part stays.
    """
    before, _, after = inspect.cleandoc(obj.__doc__ or "").partition("\nArgs:\n")
    arguments: dict[str, str] = {}
    name = ""
    for line in after.splitlines():
        if line and not line.startswith(" "):
            break
        if match := re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line):
            name = match[1]
            arguments[name] = match[2]
        elif line.strip():
            arguments[name] += f" {line.strip()}"
    return markdown(before).strip(), {key: markdown(value) for key, value in arguments.items()}


def markdown(text: str) -> str:
    """Return a docstring with single backquotes and a line a paragraph."""
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) if "    " not in paragraph else paragraph for paragraph in paragraphs)


def cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|")


def shown_type(attribute: attrs.Attribute[Any]) -> str:
    """Type and the bounds of a field."""
    kind = attribute.metadata.get(COMPONENT_KIND)
    if kind is not None:
        return f"a {KINDS[kind]}"
    bounds = ", ".join(_bounds(attribute.validator))
    return cell(type_name(attribute.type)) + (f", {bounds}" if bounds else "")


def _bounds(validator: Any) -> Iterator[str]:
    inner = [getattr(validator, name, None) for name in ("validator", "member_validator", "value_validator")]
    for other in (*inner, *getattr(validator, "_validators", ())):
        if other is not None:
            yield from _bounds(other)
    if hasattr(validator, "bound"):
        yield f"{_BOUNDS[validator.compare_op]} {'2³²' if validator.bound == 2**32 else validator.bound}"


def shown_default(attribute: attrs.Attribute[Any]) -> str:
    """Default as TOML has it."""
    default: Any = attribute.default
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()
        if attrs.has(type(default)):
            return "its own defaults"
    if default is None:
        return "–"
    value = " ".join(tomli_w.dumps({"x": plain_value(default)}).split()).removeprefix("x = ").removesuffix("[x]") or "{}"
    return f"`{value.replace('[ ', '[').replace(', ]', ']')}`"


def hook_reference() -> str:
    """Every hook, and the class that its components' ``build`` makes."""
    from importlib import import_module

    parts = [
        f"### Every config class\n\n{declared('wmtp.plugins.contract', ComponentConfig)}\n\n{contract_methods(ComponentConfig)}"
    ]
    for kind in KINDS:
        hook = getattr(hookspecs, f"wmtp_{kind}")
        text, _, example = inspect.cleandoc(hook.__doc__).partition("Example::\n")
        parts.append(f"### `wmtp_{kind}()`\n\n{markdown(text).strip()}")
        parts.append(f"```python\n{inspect.cleandoc(example)}\n```")
        parts.append(declared("wmtp", CONFIG_CLASSES[kind]))
        if kind in CONTRACTS:
            module, name = CONTRACTS[kind]
            base = getattr(import_module(module), name)
            parts.append(contract(module, base))
            if read := flags(base):
                parts[-1] += "\n\nIts class variables:\n\n" + read
            parts += [contract(module, getattr(import_module(module), other)) for other in FURTHER_CONTRACTS.get(kind, ())]
            for value in VALUES.get(kind, ()):
                home, _, value = value.rpartition(".")
                home = home or (module if hasattr(import_module(module), value) else base.__module__)
                parts.append(fields(home, getattr(import_module(home), value)))
    return "\n\n".join(parts)


def declared(module: str, cls: type[Any]) -> str:
    """Describe a base of config classes, and what the host reads."""
    read = flags(cls)
    return f"**`{module}.{cls.__name__}`** – {documentation(cls)[0]}" + (f"\n\n{read}" if read else "")


def flags(cls: type[Any]) -> str:
    """List a class's declared variables, by their ``#:`` comments."""
    found = re.findall(r"((?:^    #: .*\n)+)^    (\w+): ([^=\n]+?)(?: = (.*))?$", inspect.getsource(cls), re.MULTILINE)
    lines = []
    for comment, name, _, default in found:
        said = " ".join(line.removeprefix("    #: ") for line in comment.splitlines())
        lines.append(f"- `{name}`{f' (default `{default}`)' if default else ''}: {markdown(said)}")
    return "\n".join(lines)


def contract(module: str, cls: type[Any]) -> str:
    """Describe a base class, and its methods."""
    return f"**`{module}.{cls.__name__}`** – {documentation(cls)[0]}\n\n{contract_methods(cls)}"


def contract_methods(cls: type[Any], without: Container[str] = ()) -> str:
    """List the methods of a class, but for those of these names."""
    lines = []
    for name, member in vars(cls).items():
        if name.startswith("_") or name in without or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        function: Callable[..., Any] = member.fget if isinstance(member, property) else member  # type: ignore[assignment]
        said, arguments = documentation(function)
        needed = "required" if getattr(function, "__isabstractmethod__", False) else "optional"
        needed = f" ({needed})" if issubclass(cls, Contract) else ""  # not of what the host gives
        signature = "" if isinstance(member, property) else re.sub(r"\bself(, )?", "", signature_of(function), count=1)
        lines.append(f"- `{name}{signature}`{needed}: {flattened(said)}")
        lines += [f"    - `{argument}`: {meaning}" for argument, meaning in arguments.items()]
    return "\n".join(lines)


def fields(module: str, cls: type[Any]) -> str:
    """List the fields of a value class."""
    text, arguments = documentation(cls)
    text_of_call = not arguments
    if text_of_call:  # a protocol of one call
        text, arguments = f"{text} {documentation(cls.__call__)[0]}", documentation(cls.__call__)[1]
    lines = [f"**`{module}.{cls.__name__}`** – {text}", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in arguments.items()]
    methods = "" if text_of_call else contract_methods(cls, arguments)
    return "\n".join(lines) + (f"\n\nIts methods:\n\n{methods}" if methods else "")


def signature_of(function: Callable[..., Any]) -> str:
    """Signature as it is written."""
    return re.sub(r"""['"]""", "", str(inspect.signature(function)))


def flattened(text: str) -> str:
    """Return a docstring's paragraphs as one, for a list.

    ``Returns:`` and ``Raises:`` become sentences.
    """
    return re.sub(r"\b(Returns|Raises): ", r"\1 ", " ".join(text.split()))


def api_reference() -> str:
    """List the public names of ``wmtp`` and ``wmtp_algos`` by topic.

    Each with its first sentence and its module.
    """
    import wmtp_algos

    homes = names_in_stub(Path(wmtp.__file__).with_suffix(".pyi"))
    homes |= {name: getattr(wmtp_algos, name).__module__ for name in wmtp_algos.__all__}
    tables: dict[str, list[str]] = {title: [] for title in API}
    for name, module in homes.items():
        title = next(title for title, prefixes in API.items() if any(f"{module}.".startswith(f"{p}.") for p in prefixes))
        package = "wmtp_algos." if module.startswith("wmtp_algos") else "wmtp."
        tables[title].append(f"| `{package}{name}` | {cell(first_sentence(module, name))} | `{module}.{name}` |")
    head = "| name | meaning | defined in |\n| --- | --- | --- |\n"
    return "\n\n".join(f"## {title}\n\n{head}" + "\n".join(rows) for title, rows in tables.items())


def first_sentence(module: str, name: str) -> str:
    """Read the first sentence of a docstring or constant's comment.

    The module is not imported.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module} has no source file")
    source = Path(spec.origin).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name and (text := ast.get_docstring(node)):
            return markdown(re.split(r"(?<=\.)\s", text)[0])
    match = re.search(rf"^#: (.*)\n{name} = ", source, re.MULTILINE)
    return markdown(match[1]) if match else ""


def architectures() -> str:
    """Tabulate what the last walks over all architectures found."""
    newest = json.loads((DOCS / "architectures.json").read_text(encoding="utf-8"))
    oldest = json.loads((DOCS / "architectures-oldest.json").read_text(encoding="utf-8"))
    steps = ("padded", "packed", "decode", "speculate")
    opened = {name: found for name, found in sorted(newest["types"].items()) if found.get("open") == "ok"}
    counts = ", ".join(f"{sum(found.get(step) == 'ok' for found in opened.values())} {step}" for step in steps)
    head = f"| type | padded | packed | decode | speculate | {oldest['transformers']} |"
    rows = [head, "| --- | --- | --- | --- | --- | --- |"]
    for name, found in opened.items():
        before = oldest["types"].get(name, {})
        same = "" if before.get("open") != "ok" else "same" if _words(before) == _words(found) else "differs"
        rows.append(f"| `{name}` | {' | '.join(_word(found, step) for step in steps)} | {same} |")
    refused = [
        f"- `{name}`: {cell(_reason(found))}" for name, found in sorted(newest["types"].items()) if found.get("open") != "ok"
    ]
    said = (
        f"Of {len(newest['types'])} types of transformers {newest['transformers']}, {len(opened)} open: {counts}. The last"
        f" column is for transformers {oldest['transformers']}: the same, something differs, or not there."
    )
    return "\n".join([said, "", *rows, "", "Not opened:", "", *refused])


def _word(found: dict[str, str], step: str) -> str:
    state = found.get(step, "").partition(":")[0]
    return {"ok": "yes", "refused": "–"}.get(state, state)


def _words(found: dict[str, str]) -> list[str]:
    return [_word(found, step) for step in ("padded", "packed", "save", "decode", "speculate")]


def _reason(found: dict[str, str]) -> str:
    """Shorten why an architecture is not opened."""
    if "make" in found:
        return f"no tiny model of it could be made ({found['make'].partition(':')[0]}): not tried"
    text = re.sub(r"^\w+ cannot get multi-token heads: ", "", found["open"].partition(": ")[2].removeprefix("models.base: "))
    text = text.removesuffix(". docs/models.md says what can")
    return text if len(text) < 200 else f"{text[:197]}…"


def written(text: str, marker: str, content: str) -> str:
    """``text`` with ``content`` between its two markers."""
    begin, end = f"<!-- begin {marker}: written by docs/generate.py -->", f"<!-- end {marker} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the markers of {marker} are missing")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def pages() -> dict[Path, str]:
    """Pages with generated parts, as they should be."""
    config, hooks, api, models = (DOCS / f"{name}.md" for name in ("config", "hooks", "api", "models"))
    return {
        config: written(config.read_text(encoding="utf-8"), "config", config_reference(load_plugins())),
        hooks: written(hooks.read_text(encoding="utf-8"), "hooks", hook_reference()),
        api: written(api.read_text(encoding="utf-8"), "api", api_reference()),
        models: written(models.read_text(encoding="utf-8"), "architectures", architectures()),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(page)
