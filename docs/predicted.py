"""Prediction of speed and traffic on more GPUs than measured.

It is written into docs/distributed.md.

    uv run python docs/predicted.py

Three numbers a step: seconds of computing (operations by the data sheet's rate and the share of it that a GPU reaches), and
seconds of traffic between the GPUs of a machine and between machines (bytes by the rate of the link). With all traffic hidden
behind computing a step takes the longest of them; with none hidden, their sum. Memory is that of ``wmtp check``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from attrs import evolve, frozen

from wmtp.config.load import load_config
from wmtp.config.schema import FsdpConfig, HeadsConfig
from wmtp.models.base import ModelInfo
from wmtp.models.config import ScratchModel
from wmtp.models.outline import outline
from wmtp.training.memory import estimate_memory, head_parameters

__all__ = ["Cluster", "Job", "Prediction", "page", "predict", "table"]

PAGE = Path(__file__).with_name("distributed.md")

Strategy = Literal["full", "hybrid"]


@frozen(kw_only=True)
class Cluster:
    """Machines with as many GPUs each.

    Args:
        machines: how many there are.
        gpus: of each machine.
        peak: operations a second of a GPU, by its data sheet (bf16).
        efficiency: the share of the peak that one GPU reaches in a whole run, as measured on one or two.
        inside: bytes a second that a GPU sends to, and receives from, others of its machine.
        network: bytes a second that a machine sends, and receives.
    """

    machines: int
    gpus: int = 8
    peak: float = 989e12
    efficiency: float = 0.372
    inside: float = 300e9
    network: float

    @property
    def world_size(self) -> int:
        """GPUs of all machines."""
        return self.machines * self.gpus


@frozen(kw_only=True)
class Job:
    """Run in ``bf16-params``: layers gathered in bf16, gradients summed in fp32.

    Args:
        model: its shape.
        horizon: H, of block heads.
        length: tokens of a row.
        rows: of a GPU and micro-batch.
        micro_batches: of a step.
        strategy: of ``[devices.fsdp]``.
    """

    model: ScratchModel
    horizon: int = 4
    length: int = 2048
    rows: int = 4
    micro_batches: int = 1
    strategy: Strategy = "full"


@frozen(kw_only=True)
class Prediction:
    """One step, by the model of this file.

    Args:
        tokens: of the step.
        computing, inside, network: seconds.
        bytes_inside: that a GPU receives from others of its machine.
        bytes_network: that a machine receives from others.
        memory: of a GPU, bytes, as ``wmtp check`` estimates it.
    """

    tokens: int
    computing: float
    inside: float
    network: float
    bytes_inside: float
    bytes_network: float
    memory: int

    @property
    def most(self) -> float:
        """Tokens a second with all traffic hidden behind computing."""
        return self.tokens / max(self.computing, self.inside, self.network)

    @property
    def least(self) -> float:
        """Tokens a second with no traffic hidden."""
        return self.tokens / (self.computing + self.inside + self.network)


def predict(job: Job, cluster: Cluster) -> Prediction:
    """Predict one step of a job on a cluster."""
    info = outline(job.model)
    assert info is not None, "a model from scratch has a shape"
    heads = HeadsConfig(horizon=job.horizon)
    parameters = info.parameters + head_parameters(info, heads)
    tables = 2 * info.vocab_size * info.hidden_size  # the root's: gathered once a step, not twice a micro-batch
    layers = parameters - tables
    gathered = 2.0 * (2 * job.micro_batches * layers + tables)  # bytes in bf16
    reduced = 4.0 * parameters  # in fp32, once a step
    across = cluster.machines > 1
    # Of what n hold a part each of, one receives (n - 1) / n; a gradient that is added up and handed back goes round twice.
    if job.strategy == "full":
        inside = (gathered + reduced) * _others(cluster.world_size)
        network = (gathered + reduced) * _others(cluster.world_size) if across else 0.0  # a ring enters each machine once
    else:
        inside = (gathered + reduced) * _others(cluster.gpus)
        network = 2 * reduced * _others(cluster.machines)  # all of the machine's shards together
    tokens = job.rows * job.micro_batches * job.length
    computing = tokens * _operations(info, job) / (cluster.peak * cluster.efficiency)
    return Prediction(
        tokens=tokens * cluster.world_size,
        computing=computing,
        inside=inside / cluster.inside,
        network=network / cluster.network,
        bytes_inside=inside,
        bytes_network=network,
        memory=_memory(job, cluster, info, heads),
    )


def _others(count: int) -> float:
    return (count - 1) / count


def _operations(info: ModelInfo, job: Job) -> float:
    """Floating-point operations a token, forward and backward.

    As MFU counts them; see docs/performance.md.
    """
    layers = info.layers + job.horizon - 1
    products = layers * info.layer_parameters + job.horizon * info.vocab_size * info.hidden_size
    return 6.0 * (products + layers * job.length * info.hidden_size)


def _memory(job: Job, cluster: Cluster, info: ModelInfo, heads: HeadsConfig) -> int:
    config = load_config(
        {
            "models": {"base": {"type": "scratch", "vocab_size": info.vocab_size}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": job.length, "batch_size": job.rows * job.micro_batches * cluster.world_size,
                               "micro_batch_size": job.rows}},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"precision": "bf16-params", "compile": True, "activation_checkpointing": "full"},
        }
    )  # fmt: skip
    config = evolve(config, devices=evolve(config.devices, fsdp=FsdpConfig(strategy=job.strategy)))
    return estimate_memory(config, info, heads, world_size=cluster.world_size, per_machine=cluster.gpus).total


#: Llama-2-7B's shape, which was measured on two and four GPUs
SEVEN = ScratchModel(
    vocab_size=32_000, hidden_size=4096, layers=32, attention_heads=32, kv_heads=32, intermediate_size=11008, max_positions=4096
)
#: bytes a second of a machine: eight cards of 400 Gbit/s, and one of 100 Gbit/s, at 80 % of their rate
NETWORKS = {"8 × 400 Gbit/s": 320e9, "1 × 100 Gbit/s": 10e9}


def table() -> str:
    """Tables of the 7B shape on 8 to 256 H100s."""
    lines = []
    for name, network in NETWORKS.items():
        lines += [
            f"A machine's network: {name}.",
            "",
            "| GPUs | strategy | micro-batches | tokens/s | of linear | to a GPU inside | to a machine | memory of a GPU |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for machines in (1, 2, 8, 32):
            for strategy in ("full", "hybrid") if machines > 1 else ("full",):
                for micro_batches in (1, 8):
                    cluster = Cluster(machines=machines, network=network)
                    job = Job(model=SEVEN, strategy=strategy, micro_batches=micro_batches)
                    found = predict(job, cluster)
                    linear = found.tokens / found.computing
                    lines.append(
                        f"| {cluster.world_size} | `{strategy}` | {micro_batches} | {found.least:,.0f} to {found.most:,.0f} | "
                        f"{found.least / linear:.2f} to {found.most / linear:.2f} | {found.bytes_inside / 1e9:.0f} GB | "
                        f"{found.bytes_network / 1e9:.0f} GB | {found.memory / 2**30:.0f} GiB |"
                    )
        lines.append("")
    return "\n".join(lines).rstrip()


def page() -> str:
    """Return docs/distributed.md with the tables as they should be."""
    begin, end = "<!-- begin prediction: written by docs/predicted.py -->", "<!-- end prediction -->"
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    return f"{head}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
