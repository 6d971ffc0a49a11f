"""Decoding on a CPU beside vLLM, with the same exported heads.

Tokens per second, and whether the texts are the same.

    python bench/decode_vllm.py --vllm vllm/bin/python            # docs/serving.md says how that environment is made
    python bench/decode_vllm.py --vllm vllm/bin/python --new 64 --layers 8

The model has the shape of SmolLM2-135M, random weights and one shared head, a copy of its last layer, exported to ``mtp``.
Prompts are decoded one by one; the first warms up and does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.config.schema import HeadsConfig
from wmtp.generation import generate
from wmtp.models.mtp import MTPModel

SERVER = Path(__file__).parent.parent / "tests/served_by_vllm.py"


def main() -> None:
    """Measure both, plain and speculative."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=3, help="the first warms up")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": given.layers})).eval()
    model = MTPModel(base, HeadsConfig(horizon=given.drafts + 1, kind="shared", init="copy"), seed=1).eval()
    prompts = [torch.randint(5, SHAPE["vocab_size"], (32,)).tolist() for _ in range(given.prompts)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "model")
        wmtp.export(folder / "model", folder / "served", format="mtp")
        (folder / "prompts.json").write_text(json.dumps(prompts))
        for drafts in (0, given.drafts):
            ours = _ours(model, prompts, given.new, speculative=drafts > 0)
            theirs = _theirs(given, folder, drafts)
            name = "speculative" if drafts else "plain"
            for who, found in (("wmtp", ours), ("vllm", theirs)):
                rate = given.new * (len(prompts) - 1) / sum(found["seconds"][1:])
                print(f"{who:6} {name:12} {rate:8.1f} tokens/s", flush=True)
            print(f"       {name:12} same text: {ours['texts'] == theirs['texts']}", flush=True)


def _ours(model: MTPModel, prompts: list[list[int]], new: int, *, speculative: bool) -> dict[str, Any]:
    texts, seconds = [], []
    for prompt in prompts:
        began = time.perf_counter()
        [row] = generate(model, [prompt], max_new_tokens=new, eos_id=None, speculative=speculative)
        seconds.append(time.perf_counter() - began)
        texts.append(list(row.tokens))
    return {"texts": texts, "seconds": seconds}


def _theirs(given: argparse.Namespace, folder: Path, drafts: int) -> dict[str, Any]:
    command = [given.vllm, SERVER, folder / "served", folder / "prompts.json", given.new, drafts, "float32"]
    environment = {"OMP_NUM_THREADS": str(given.threads), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.partition("RESULT ")[2])


if __name__ == "__main__":
    main()
