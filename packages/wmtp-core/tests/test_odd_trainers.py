"""Unusual but sound trainers are accepted; those that would silently be a baseline are refused, by the right name."""

import textwrap
from typing import Any

import pytest

from wmtp.errors import PluginError
from wmtp.trainers.declarations import check_trainer

HEAD = """
from abc import ABC, abstractmethod
from functools import cached_property, partial, partialmethod, wraps
from types import SimpleNamespace
from typing import Protocol
import attrs, torch, wmtp
from torch import nn
from wmtp import Trainer

class Weighs:
    def token_weights(self, view): return view.uniform() * 2

class Scales:
    def scaled(self, view): return view.uniform() * 2

class Shape(Protocol):
    def token_weights(self, view): ...

def doubled(method):
    @wraps(method)
    def wrapper(self, view):
        method(self, view)
        return view.uniform() * 2
    return wrapper
"""

SOUND = {
    "a mixin in front": "class Made(Weighs, Trainer): pass",
    "a mixin behind, overridden": "class Made(Trainer, Weighs):\n    token_weights = Weighs.token_weights",
    "a mixin of helpers behind": "class Made(Trainer, Scales):\n    def token_weights(self, view): return self.scaled(view)",
    "a protocol behind": "class Made(Trainer, Shape):\n    def metrics(self): return {}",
    "an abstract mixin behind": """
        class Stub(ABC):
            @abstractmethod
            def token_weights(self, view): ...
        class Made(Trainer, Stub): pass""",
    "an abstract base, whose stub is overridden": """
        class Base(Trainer):
            @abstractmethod
            def token_weights(self, view): ...
        class Made(Base):
            def token_weights(self, view): return view.uniform()""",
    "a base with a stub that is overridden": """
        class Base(Trainer):
            def token_weights(self, view): pass
        class Made(Base):
            def token_weights(self, view): return view.uniform()""",
    "partialmethod": """
        class Made(Trainer):
            def _weights(self, view, power): return view.uniform() * power
            token_weights = partialmethod(_weights, power=2)""",
    "classmethod": "class Made(Trainer):\n    @classmethod\n    def token_weights(cls, view): return view.uniform()",
    "staticmethod": "class Made(Trainer):\n    @staticmethod\n    def token_weights(view): return view.uniform()",
    "a descriptor": """
        class Bound:
            def __get__(self, trainer, owner=None): return lambda view: view.uniform()
        class Made(Trainer):
            token_weights = Bound()""",
    "a decorator that supplies the result": "class Made(Trainer):\n    @doubled\n    def token_weights(self, view): pass",
    "a decorator of torch": """
        class Made(Trainer):
            @torch.no_grad()
            def token_weights(self, view): return view.uniform()""",
    "a method set on the instance": """
        class Made(Trainer):
            def __init__(self): self.token_weights = self.halved
            def halved(self, view): return view.uniform() / 2""",
    "a method set by build": """
        class Plain(Trainer):
            def halved(self, view): return view.uniform() / 2
        def Made():
            made = Plain()
            made.token_weights = made.halved
            return made""",
    "a module behind": """
        class Made(Trainer, nn.Module):
            def __init__(self):
                nn.Module.__init__(self)
                self.module = nn.Linear(2, 2)
            def modules(self): return {"own": self.module}
            def token_weights(self, view): return view.uniform()""",
    "a module in front": """
        class Made(nn.Module, Trainer):
            def __init__(self):
                super().__init__()
                self.stage = nn.Linear(2, 2)
            def modules(self): return {"own": self.stage}""",
    "a module that is a value": """
        class Made(Trainer):
            def __init__(self): self.module = nn.Linear(2, 2)
            def modules(self): return {"own": self.module}""",
    "a cached flag": """
        class Made(Trainer):
            @cached_property
            def needs_token_loss(self): return True
            def token_weights(self, view): return view.token_loss""",
    "a cached flag of an attrs class with slots": """
        @attrs.define
        class Made(Trainer):
            power: float = 1.0
            @cached_property
            def needs_token_loss(self): return self.power > 0
            def token_weights(self, view): return view.token_loss""",
    "a flag as a field of a trainer with state": """
        @attrs.define
        class Made(Trainer):
            needs_token_loss: bool = True
            entropy_top_k: int | None = 5
            def token_weights(self, view): return view.token_loss""",
    "the same without slots": """
        @attrs.define(slots=False)
        class Made(Trainer):
            needs_token_loss: bool = attrs.field(default=True)
            def token_weights(self, view): return view.token_loss""",
    "a flag set by setattr": """
        class Made(Trainer):
            def __init__(self): setattr(self, "needs_" + "entropy", True)
            def token_weights(self, view): return view.entropy""",
    "a flag set by build": """
        class Plain(Trainer):
            def token_weights(self, view): return view.token_loss
        def Made():
            made = Plain()
            made.needs_token_loss = True
            return made""",
    "a flag of a mixin in front": """
        class Flag:
            needs_token_loss = True
        class Made(Flag, Trainer):
            def token_weights(self, view): return view.token_loss""",
    "a config with such names": """
        class Made(Trainer):
            def __init__(self): self._read(SimpleNamespace(entropy=1, token_loss=2))
            def _read(self, config): self.scale = config.entropy + config.token_loss
            def token_weights(self, view): return view.uniform() * self.scale""",
    "init reads such names": """
        class Made(Trainer):
            def __init__(self, config=SimpleNamespace(entropy=1)): self.scale = config.entropy
            def token_weights(self, view): return view.uniform() * self.scale""",
    "helpers with near names that it uses": """
        class Made(Trainer):
            def observe(self, view): return self.observed(view)
            def observed(self, view): return {"x": view.trunk[..., 0]}
            def stages(self): return [self.stage()]
            def stage(self): return wmtp.Stage()
            def token_weights(self, view): return self.token_weight(view)
            def token_weight(self, view): return self.weigh(view)
            def weigh(self, view): return view.uniform()""",
    "near names with further words, other arguments, or as values": """
        class Made(Trainer):
            states = ("a", "b")
            unit = 3
            types: tuple = ()
            def __init__(self): self.module, self.stages_seen = "x", 0
            def log_metrics(self): return {}
            def modules_of(self, name): return []
            def set_up(self): pass
            def metric(self, name, value): return {}
            def token_weights(self, view): return view.uniform()
            @property
            def stage(self): return "x\"""",
    "a baseline that logs, with a helper": """
        class Made(Trainer):
            def metrics(self): return {"n": self.counted(1)}
            def counted(self, n): return float(n)
            def describe(self): return "text"
            @classmethod
            def of(cls, name): return cls()""",
    "stages only": "class Made(Trainer):\n    def stages(self): return [wmtp.Stage()]\n    def plan(self, x): return x",
    "nothing": "class Made(Trainer): pass",
}  # fmt: skip

HIDDEN = "Weighs.token_weights is hidden by Trainer.token_weights; write the mixin first: class Made(Weighs, Trainer)"
NEITHER = (
    "and neither token_weights nor auxiliary_losses, which the loop calls; to weight tokens, write token_weights(self, view)"
)
BROKEN = {
    "a mixin behind": ("class Made(Trainer, Weighs): pass", HIDDEN),
    "a mixin's flag behind": (
        "class Flag:\n    needs_entropy = True\nclass Made(Trainer, Flag): pass",
        "Flag.needs_entropy is hidden by Trainer.needs_entropy; write the mixin first: class Made(Flag, Trainer)",
    ),
    "a mixin behind another trainer": ("class A(Trainer): pass\nclass Made(A, Weighs): pass", "Weighs.token_weights is hidden"),
    "a misspelt method of a mixin": (
        "class Mixin:\n    def token_weight(self, view): return view.uniform()\nclass Made(Mixin, Trainer): pass",
        "Mixin has 'token_weight', which WMTP does not read; did you mean 'token_weights'?",
    ),
    "a misspelt flag of a mixin behind": (
        "class Mixin:\n    needs_tokenloss = True\nclass Made(Trainer, Mixin): pass",
        "Mixin has 'needs_tokenloss', which WMTP does not read; did you mean 'needs_token_loss'?",
    ),
    "a misspelt override": (
        "class Base(Weighs, Trainer): pass\nclass Made(Base):\n    def token_weight(self, view): return view.uniform()",
        "Made has 'token_weight', which WMTP does not read",
    ),
    "a misspelt partial": (
        "class Made(Trainer):\n    token_weight = partial(torch.ones_like)",
        "Made has 'token_weight', which WMTP does not read; did you mean 'token_weights'?",
    ),
    "a misspelt method of the instance": (
        "class Made(Trainer):\n    def __init__(self): self.token_weight = lambda view: view.uniform()",
        "Made sets self.token_weight, which WMTP does not read; did you mean 'token_weights'?",
    ),
    "weights beside metrics": (
        "class Made(Trainer):\n    def metrics(self): return {}\n    def weights(self, view): return view.uniform()",
        f"Made has weights(), {NEITHER}",
    ),
    "private weights": (
        "class Made(Trainer):\n    def _token_weights(self, view): return view.uniform()",
        f"Made has _token_weights(), {NEITHER}",
    ),
    "weights that only the report shows": (
        "class Made(Trainer):\n    def token_details(self, view): return {'w': self._token_weight(view)}\n"
        "    def _token_weight(self, view): return view.uniform()",
        f"Made has _token_weight(), {NEITHER}",
    ),
    "a mixin's weights": (
        "class Mixin:\n    def weights(self, view): return view.uniform()\nclass Made(Mixin, Trainer): pass",
        f"Made has weights(), {NEITHER}",
    ),
    "top k as bool": ("class Made(Trainer):\n    entropy_top_k = True", "entropy_top_k is True; write a whole number"),
    "top k of 0": ("class Made(Trainer):\n    entropy_top_k = 0", "entropy_top_k is 0; write a whole number of tokens"),
    "top k of the instance": (
        "class Made(Trainer):\n    def __init__(self): self.entropy_top_k = 2.5",
        "entropy_top_k is 2.5; write a whole number of tokens, 1 or more, or None",
    ),
    "a text as a flag of the instance": (
        "class Made(Trainer):\n    def __init__(self): self.needs_entropy = 'no'",
        "needs_entropy is 'no'; write True or False",
    ),
    "a flag that is a method": (
        "class Made(Trainer):\n    def needs_entropy(self): return True",
        "needs_entropy is a method, which is not called; write @property above it",
    ),
    "a generator": (
        "class Made(Trainer):\n    def token_weights(self, view): yield view.uniform()",
        "Made.token_weights has a yield, so a call does not run it; write return",
    ),
    "setup with a yield": (
        "class Made(Trainer):\n    def setup(self, setup): yield",
        "Made.setup has a yield, so a call does not run it; write return",
    ),
    "a coroutine": (
        "class Made(Trainer):\n    async def token_weights(self, view): return view.uniform()",
        "Made.token_weights is async, which the loop does not await; write def without async",
    ),
    "a static method without return": (
        "class Made(Trainer):\n    @staticmethod\n    def token_weights(view): view.uniform()",
        "Made.token_weights returns nothing",
    ),
    "a static method that reads": (
        "class Made(Trainer):\n    @staticmethod\n    def token_weights(view): return view.entropy",
        "Made.token_weights reads view.entropy, which is not computed; write needs_entropy = True in Made",
    ),
    "a mixin that reads": (
        "class Mixin:\n    def token_weights(self, view): return view.token_loss\nclass Made(Mixin, Trainer): pass",
        "Mixin.token_weights reads view.token_loss, which is not computed; write needs_token_loss = True in Made",
    ),
}  # fmt: skip


def made(code):
    found: dict[str, Any] = {"__name__": "mine"}
    exec(HEAD + textwrap.dedent(code), found)
    return check_trainer(found["Made"](), "trainer")


@pytest.mark.parametrize("code", SOUND.values(), ids=SOUND)
def test_an_odd_but_sound_trainer_is_accepted(code):
    made(code)


@pytest.mark.parametrize(("code", "said"), BROKEN.values(), ids=BROKEN)
def test_a_trainer_that_would_not_do_what_it_says_is_refused(code, said):
    with pytest.raises(PluginError) as refused:
        made(code)
    assert said in str(refused.value)


def test_a_mixin_behind_any_component_is_refused():
    """The same holds for components other than trainers."""
    from wmtp.tracking import Tracker

    class Logs:
        def log_artifact(self, file): ...

    with pytest.raises(PluginError, match=r"Logs.log_artifact is hidden by Tracker.log_artifact"):
        type("Made", (Tracker, Logs), {})
