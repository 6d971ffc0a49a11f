"""Our own algorithms pass the suite that plugins inherit."""

from wmtp.testing import TrainerTests
from wmtp_algos.baseline_mtp_config import BaselineMTP


class TestBaselineMTP(TrainerTests):
    config = BaselineMTP()
