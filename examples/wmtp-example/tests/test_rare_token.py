from wmtp.testing import TrainerTests
from wmtp_example.plugin import RareToken


class TestRareToken(TrainerTests):
    config = RareToken(power=0.7, max_weight=3.0)
