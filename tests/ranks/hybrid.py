"""Four ranks, as two machines with two each, against one: run by test_distributed.py in each of four processes.

With ``all`` as argument, in every setting; else in a sample.
"""

import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from attrs import evolve

sys.path.insert(0, str(Path(__file__).parent))
from steps import ValueHead, compare, make_model, one_process_group, one_step, whole

from wmtp.checkpoints.local import Checkpoint, load_checkpoint, save_checkpoint
from wmtp.config.schema import FsdpConfig
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.models.layers import repeated_layers
from wmtp.models.sharding import Sharding, spread
from wmtp.optim.config import AdamW
from wmtp.testing.steps import random_step
from wmtp.trainers import Stage

CPU = torch.device("cpu")


@contextmanager
def traffic():
    """Count collectives by their kind and the number of ranks in them."""
    seen = Counter()
    kinds = {  # newer torch has further names
        "all_reduce": "all-reduce",
        "reduce_scatter_tensor": "reduce-scatter",
        "reduce_scatter_single": "reduce-scatter",
    }

    def counted(name, kind):
        real = getattr(dist, name)

        def call(*args, **kwargs):
            seen[kind, dist.get_world_size(kwargs.get("group"))] += 1
            return real(*args, **kwargs)

        return patch.object(dist, name, call)

    with ExitStack() as stack:
        for name, kind in kinds.items():
            if hasattr(dist, name):
                stack.enter_context(counted(name, kind))
        yield seen


def count_collectives(ranks, settings):
    """Gradients cross to other machines once a step, and within a machine as often as the config says."""
    for every in settings:
        fsdp = FsdpConfig(strategy="hybrid", reduce_every_micro_batch=every)
        model = spread(make_model, ranks, CPU, fsdp, "fp32").eval()
        layers = len(list(repeated_layers(model)))
        step = random_step(1, packed=False, rows=12)
        with traffic() as seen:
            one_step(model, ValueHead(), ranks, step=step, rows=12, micro=1, stage=Stage(), sharding=Sharding(config=fsdp))
        # three micro-batches; the root's own gradient is reduced with the last
        assert seen["reduce-scatter", 2] == (3 * layers + 1 if every else layers + 1), seen
        assert seen["all-reduce", 2] == layers + 1, seen
        assert not seen["reduce-scatter", 4], seen


def take_checkpoints(ranks, folder, strategies):
    """A checkpoint of two machines opens in other layouts, None for one process, and one of one process opens on both."""

    def made(strategy, group):
        if strategy is None:
            model = make_model()
        else:
            model = spread(make_model, group, CPU, FsdpConfig(strategy=strategy), "fp32").eval()
        return model, AdamW(lr=1e-2).build(list(model.named_parameters()))

    def stepped(model, optimizer):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
        optimizer.step()
        optimizer.zero_grad()
        return {name: whole(parameter) for name, parameter in model.named_parameters()}

    model, optimizer = made("hybrid", ranks)
    stepped(model, optimizer)
    saved = save_checkpoint(folder, 1, model, optimizer, {"a": 1}, ranks)
    expected = stepped(model, optimizer)
    for strategy in strategies:
        group = SINGLE_PROCESS if strategy is None else ranks
        other, its_optimizer = made(strategy, group)
        assert load_checkpoint(saved, other, its_optimizer, group) == {"a": 1}
        ranks.barrier()  # none may use what it has read before all have
        found = stepped(other, its_optimizer)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=f"{strategy}: {name}")
    single, its_optimizer = made(None, SINGLE_PROCESS)
    stepped(single, its_optimizer)
    written = ranks.main_only(lambda: save_checkpoint(folder, 2, single, its_optimizer, {}).path)
    model, optimizer = made("hybrid", ranks)
    load_checkpoint(Checkpoint(path=written, step=2), model, optimizer, ranks)
    ranks.barrier()  # rank 0 removes the folder at its end, and waits for its own machine alone
    ours = stepped(model, optimizer)
    for name, tensor in stepped(single, its_optimizer).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=f"back: {name}")


if __name__ == "__main__":
    with one_process_group() as everyone, tempfile.TemporaryDirectory() as own:
        machines = evolve(everyone, local_rank=everyone.rank % 2, per_machine=2)
        is_sample = sys.argv[1:] != ["all"]
        if not is_sample:
            compare("hybrid, every micro-batch", machines, ValueHead, "hybrid", packed=True, rows=4, micro=1)
        compare("hybrid", machines, ValueHead, "hybrid", rows=5, micro=1)
        count_collectives(machines, [False] if is_sample else [False, True])
        take_checkpoints(machines, Path(machines.main_only(lambda: own)), ["full"] if is_sample else ["full", None])
        print("all equal" if everyone.is_main else "", flush=True)
