"""Write a Llama folder with random weights, on a GPU if possible.

``python bench/random_model.py FOLDER JSON [DTYPE]``

``JSON`` holds the arguments of ``LlamaConfig``, ``DTYPE`` is BF16, F16 or F32. A process of its own, so that no GPU memory
stays taken. Drawing billions of random numbers takes a CPU minutes, and a run that reads its model from files is what users
have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, facts: dict[str, Any], dtype: str = "BF16") -> None:
    """Draw matrices from N(0, 0.02²), and save shards of some 4 GB.

    Norms are one.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    config = LlamaConfig(**facts, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype=kind)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    written, size = 0, 0
    for number, (name, shape) in enumerate(shapes.items(), 1):
        tensor = torch.ones(shape, dtype=kind, device=device)
        shard[name] = (tensor.normal_(std=0.02) if len(shape) > 1 else tensor).cpu()
        size += shard[name].nbytes
        if size > 4e9 or number == len(shapes):
            written += 1
            file = f"model-{written:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:])
