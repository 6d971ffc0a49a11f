"""Early stopping: when it stops, and what it says of a metric that is never measured."""

import logging

import pytest

from wmtp.config.schema import EarlyStoppingConfig
from wmtp.training.early_stopping import EarlyStopping


@pytest.fixture
def said():
    """Capture the log by a handler of our own: others' may stand on the logger and on the root."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("wmtp").addHandler(handler)
    yield messages
    logging.getLogger("wmtp").removeHandler(handler)


def test_it_stops_after_so_many_measurements_without_progress():
    stopping = EarlyStopping(EarlyStoppingConfig(metric="loss", patience=2, min_delta=0.1))
    said = [stopping.should_stop({"loss": loss}) for loss in (3.0, 2.0, 1.95, 1.5, 1.45, 1.41)]
    assert said == [False, False, False, False, False, True]
    again = EarlyStopping(EarlyStoppingConfig(metric="loss", patience=2))
    again.load_state_dict(stopping.state_dict())
    assert again.exhausted


@pytest.mark.parametrize(
    ("metric", "hint"), [("loss/head_9", "did you mean 'loss/head_1'?"), ("eval/los", "did you mean 'eval/loss'?")]
)
def test_a_metric_that_nothing_measures_is_said_once(said, metric, hint):
    stopping = EarlyStopping(EarlyStoppingConfig(metric=metric))
    for _ in range(3):
        assert not stopping.should_stop({"loss": 1.0, "loss/head_1": 1.0, "eval/loss": 1.0})
    (message,) = (message for message in said if message.startswith("train.early_stopping"))
    assert f"nothing has measured '{metric}' so far" in message
    assert message.endswith(hint)


def test_nothing_is_said_between_two_evaluations(said):
    stopping = EarlyStopping(EarlyStoppingConfig(metric="eval/loss"))
    stopping.should_stop({"loss": 1.0})
    stopping.should_stop({})
    assert not [message for message in said if message.startswith("train.early_stopping")]
