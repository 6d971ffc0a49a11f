"""Model card of an export: what is known, and what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import tomli_w

from wmtp.evaluation.measure import DETAILS_FILE
from wmtp.models.mtp import MTPModel
from wmtp.redaction import redact
from wmtp.runs.directory import CONFIG_FILE
from wmtp.runs.files import read_info, read_object, read_snapshot
from wmtp.runs.fixed import with_given_paths
from wmtp.runs.step_file import read_steps
from wmtp.storage.hub.names import parse_hub_uri
from wmtp.tokenizers import Tokenizer
from wmtp.tokenizers.bytes import BytesTokenizer

__all__ = ["model_card"]

#: what of the config decides what was learned; where things lie and who is told is nobody else's business
_SETTINGS: Final = ("models", "tokenizer", "datasets", "data", "trainer", "optimizer", "schedule", "train")
_NO_RUN: Final = "Not recorded: the model was exported from a model folder without its run directory."

_USE: Final = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
```

The folder holds head 1 alone, the model's own next-token head: an ordinary model of its architecture.""",
    "native": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")  # without its layers for multi-token prediction
```

The model with its own layers for multi-token prediction, trained, under the names that servers read.""",
    "wmtp": """\
```python
import wmtp

model = wmtp.load_model("THIS_FOLDER")  # all heads; wmtp-core[train]
```

`AutoModelForCausalLM.from_pretrained` of transformers opens head 1, the model's own next-token head: an ordinary model of its
architecture. Heads 2..H are in `mtp_heads.safetensors`, where there are any.""",
    "adapter": """\
```python
import wmtp

model = wmtp.load_model("THIS_FOLDER")  # the base with its adapter, and all heads; wmtp-core[train,lora]
```

`peft.AutoPeftModelForCausalLM.from_pretrained` opens head 1, the model's own next-token head, on the base. Heads 2..H are in
`mtp_heads.safetensors`, where there are any. `wmtp export --format hf` merges the adapter into the base.""",
    "meta": """\
`consolidated.pth` is a plain mapping from names to tensors: `torch.load(file, weights_only=True)`. Heads 2..H are in
`extra_heads`; `n_layers` counts every head. WMTP opens the folder again with `type = "meta-mtp"`.""",
    "mtp": """\
```sh
vllm serve THIS_FOLDER --speculative-config '{{"method": "mtp", "num_speculative_tokens": {extra}}}'
```

An ordinary model with a layer for multi-token prediction, written as a model that servers know (`config.json` names it).
`num_speculative_tokens` may be any number: the layer is applied again and again. It was trained for {extra}. WMTP opens
the folder again, with heads of kind `native`. Where there is a folder `tokenizer` in it, add
`--tokenizer THIS_FOLDER/tokenizer`: servers would split text as Qwen2 does.""",
    "medusa": """\
This folder holds the draft heads only. The model that they belong to is its `--format hf` export:

```sh
vllm serve HF_EXPORT --speculative-config '{{"method": "medusa", "model": "THIS_FOLDER", "num_speculative_tokens": {extra}}}'
```

`num_speculative_tokens` may be less than {extra}, never more. vLLM up to 0.32 reads such a folder; vLLM 0.33 and
SGLang 0.5.23 do not.""",
}
_PROOF: Final = {
    "hf": "The logits of such an export in plain transformers are tested to be those of head 1.",
    "wmtp": "The logits of such a folder in plain transformers are tested to be those of head 1.",
    "adapter": "The logits of such a folder in peft are tested to be those of head 1.",
    "meta": "Names, shapes and the forward pass of this layout are tested against a plain implementation of Meta's published\n"
    "description, not against Meta's own weights or code.",
    "mtp": "Such folders of small models were served by vLLM 0.32 on a CPU: the text was the same with and without\n"
    "speculation.",
    "medusa": "Names, shapes and the forward pass of this layout are tested against a plain re-implementation of vLLM's\n"
    "`MedusaModel`; the folder was not run inside vLLM.",
}

_UNKNOWN: Final = """\
Nothing is known of this model beyond what stands here: not its safety, not its biases, not how it does on other data or
in other languages. The base model's own limits, and its licence and that of the data, apply; WMTP does not record them."""


def model_card(
    model: MTPModel,
    *,
    format: str,
    run_dir: Path | None,
    source: Path,
    tokenizer: Tokenizer | None,
    step: int | None = None,
) -> str:
    """Write the text of ``README.md``.

    Args:
        model: what was exported.
        format: a key of `wmtp.exporting.FORMATS`, or ``adapter`` for the folder of an adapter.
        run_dir: the run that trained it; None where it is not known.
        source: the model's path.
        tokenizer: the one in the export; None where there is none.
        step: that of the checkpoint whose weights these are; None for the run's own model.

    Raises:
        WMTPError: a file of the run is damaged.
    """
    title = run_dir.name if run_dir is not None else source.stem if source.is_file() else source.name
    libraries = {"hf": "transformers", "wmtp": "transformers", "adapter": "peft"}
    library = f"library_name: {libraries[format]}\n" if format in libraries else ""
    parts = [
        f"---\n{library}{_base(run_dir)}tags:\n- wmtp\n- multi-token-prediction\n---",
        f"# {title}",
        *_what(model, format, tokenizer),
        "## Use",
        _USE["native" if format == "hf" and model.native is not None else format].format(extra=model.horizon - 1),
        "## Training",
        *([] if step is None else [f"The weights are those of the checkpoint of step {step}, not of the run's own `model/`."]),
        *(_training(run_dir) if run_dir is not None else [_NO_RUN]),
        "## Evaluation",
        *(_evaluation(run_dir) if run_dir is not None else ["No results are recorded."]),
        "## Limits",
        _PROOF[format],
        _UNKNOWN,
    ]
    return "\n\n".join(parts) + "\n"


def _base(run_dir: Path | None) -> str:
    """Name a base model of the hub in the card's header."""
    uri = None if run_dir is None else read_snapshot(run_dir / CONFIG_FILE).get("models", {}).get("base", {}).get("uri")
    return f"base_model: {parse_hub_uri(uri).repo}\n" if isinstance(uri, str) and uri.startswith("hf://") else ""


def _what(model: MTPModel, format: str, tokenizer: Tokenizer | None) -> Iterator[str]:
    count = sum(parameter.numel() for parameter in model.base.parameters())
    extra = sum(parameter.numel() for parameter in model.extra_heads.parameters())
    heads = (
        f"H = {model.horizon}: head 1 and {model.horizon - 1} more of kind `{model.heads.kind}` with {extra:,} parameters"
        if model.horizon > 1
        else "H = 1, no extra heads"
    )
    dtype = str(model.anatomy.output.weight.dtype).removeprefix("torch.")
    lines = [
        f"- architecture: {type(model.base).__name__}, {count:,} parameters, {dtype}",
        f"- heads of the model that was exported: {heads}",
        f"- format of this folder: `{format}`, written by WMTP",
    ]
    if format != "medusa":
        lines.append(f"- tokenizer: {_tokenizer(tokenizer, model.vocab_size)}")
    yield "\n".join(lines)


def _tokenizer(tokenizer: Tokenizer | None, rows: int) -> str:
    if tokenizer is None:
        return "none was found beside the model; it is not in this folder"
    if isinstance(tokenizer, BytesTokenizer):
        end = f"the bytes of the text in UTF-8; {tokenizer.eos_id} ends a text"
        return end + ("" if tokenizer.bos_id is None else f", {tokenizer.bos_id} begins it") + ". transformers has none like it"
    return f"{tokenizer.vocab_size:,} tokens (the model has {rows:,} rows for them)"


def _training(run_dir: Path) -> Iterator[str]:
    config = with_given_paths(run_dir, read_snapshot(run_dir / CONFIG_FILE))
    info = read_info(run_dir)
    metrics = run_dir / "metrics.jsonl"
    steps = read_steps(metrics) if metrics.exists() else []
    versions = ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items())
    trainer = config.get("trainer", {}).get("type", "unknown")
    base = config.get("models", {}).get("base", {})
    yield "\n".join(
        [
            f"- trainer: `{trainer}`",
            f"- started from: {_component(base)}",
            f"- steps: {steps[-1]['step']:,}" if steps else "- steps: not recorded",
            f"- state of the run: {info.get('status', 'unknown')}",
            f"- seed: {info.get('seed', 'not recorded')}",
            f"- software: {versions or 'not recorded'}",
        ]
    )
    yield "### Data sets"
    datasets = config.get("datasets", {})
    used = config.get("data", {}).get("train", {}).get("sources", datasets)
    yield "\n".join(f"- `{name}`: {_component(datasets[name])}" for name in used if name in datasets) or "Not recorded."
    yield "### Metrics"
    yield from _metrics(steps)
    yield from _drafts(steps)
    yield "### Settings"
    yield f"```toml\n{tomli_w.dumps({key: _public(config[key]) for key in _SETTINGS if key in config})}```"


def _metrics(steps: list[dict[str, Any]]) -> Iterator[str]:
    last: dict[str, tuple[float, int]] = {}
    for record in steps:
        for name, value in record.items():
            if name.removeprefix("eval/").startswith("loss") and isinstance(value, int | float):
                last[name] = (value, record["step"])
    if not last:
        yield "Not recorded."
        return
    yield "Cross entropy in nats a token, of the last step at which each was logged; `eval/` is on data held out from training."
    rows = [f"| {name} | {value:.4f} | {step:,} |" for name, (value, step) in last.items()]
    yield "\n".join(["| metric | value | step |", "| --- | --- | --- |", *rows])


def _drafts(steps: list[dict[str, Any]]) -> Iterator[str]:
    """Show the accepted drafts at the first and the last evaluation."""
    measured = [record for record in steps if "eval/tokens_per_forward" in record]
    if not measured:
        return
    first, last = measured[0], measured[-1]
    names = [
        name for name in last if name.startswith(("eval/acceptance/", "eval/accepted/")) or name == "eval/tokens_per_forward"
    ]
    yield (
        "Drafts of heads 2..H that head 1 would accept on data held out from training: `acceptance` sampled, by head; "
        "`accepted` greedy, all up to a depth; `tokens_per_forward` of greedy decoding along the text."
    )
    rows = [f"| {name} | {_number(first.get(name))} | {_number(last[name])} |" for name in names]
    header = [f"| metric | step {first['step']:,} | step {last['step']:,} |", "| --- | --- | --- |"]
    yield "\n".join([*header, *rows])


def _evaluation(run_dir: Path) -> Iterator[str]:
    details = read_object(run_dir / DETAILS_FILE)
    rows = []
    settings = []
    for label, measured in details.items():
        for name, result in measured.get("results", {}).items():
            if "/" not in name:  # the others are details of these
                rows.append(f"| {label} | {name} | {_number(result.get('value'))} | {_interval(result)} | {_units(result)} |")
        settings.append(
            f"- {label}: seed {measured.get('seed')}, {measured.get('device')}, {measured.get('dtype')}; "
            f"`{json.dumps(_public(measured.get('settings', {})))}`"
        )
    if not rows:
        yield "No results are recorded."
        return
    yield "By `wmtp eval`; the intervals are 95 % bootstrap intervals over n units."
    header = ["| evaluator | measure | value | 95 % interval | n |", "| --- | --- | --- | --- | --- |"]
    yield "\n".join([*header, *rows])
    yield "\n".join(settings)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def _interval(result: Mapping[str, Any]) -> str:
    return f"{_number(result['low'])} to {_number(result['high'])}" if {"low", "high"} <= result.keys() else "not known"


def _units(result: Mapping[str, Any]) -> str:
    return f"{result['n']:,} {result.get('unit', '')}".strip() if "n" in result else "not known"


def _component(table: Mapping[str, Any]) -> str:
    uri = table.get("uri")
    return f"`{table.get('type', 'unknown')}`" + (f", `{_public(uri)}`" if uri is not None else "")


def _public(value: Any) -> Any:
    """Remove user, password and signature from the URIs in a value."""
    if isinstance(value, Mapping):
        return {key: _public(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_public(element) for element in value]
    return redact(value).partition("?")[0] if isinstance(value, str) and "://" in value else value
