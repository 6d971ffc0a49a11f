"""A small model with an adapter, and the same model by torch alone."""

import math

import torch
from attrs import evolve

from wmtp.config.schema import HeadsConfig, LoraConfig
from wmtp.models.adapter_folder import name_base
from wmtp.models.build import build_model
from wmtp.models.loaders.hf import HfLoader

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make(base, *, lora=None, dtype=torch.float32, moved=True, **heads):
    """A model with an adapter that is away from its start, where it would change nothing."""
    loaded = HfLoader().load(base, dtype=torch.float32, seed=0)
    heads = HeadsConfig(**{"horizon": 3, "init": "random"} | heads)
    model = build_model(loaded, heads, 5, lora=lora or LoraConfig(rank=2), name=name_base(str(base), base)).to(dtype).eval()
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.2)
    return model


def plain_twin(base, model, lora):
    """The same model with W + s·B·A in the place of each adapted weight, by torch alone, and the leaves A and B."""
    heads = evolve(model.heads)
    twin = build_model(HfLoader().load(base, dtype=torch.float32, seed=0), heads, 5).double().eval()
    adapter = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    scale = lora.resolved_alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    for name, module in list(twin.named_modules()):
        if (a := adapter.get(f"{name}.lora_A.default.weight")) is not None:
            weight = module.weight.detach() + scale * adapter[f"{name}.lora_B.default.weight"] @ a
            if lora.dora:  # the norm is taken as a constant (arXiv 2402.09353, §4.3)
                length = adapter[f"{name}.lora_magnitude_vector.default.weight"]
                weight = weight * (length / weight.norm(dim=1).detach())[:, None]
            del module._parameters["weight"]
            module.weight = weight
    return twin, adapter
