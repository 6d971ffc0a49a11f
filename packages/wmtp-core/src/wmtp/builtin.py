"""Built-in components of wmtp-core, an ordinary plugin; imports no torch."""

from __future__ import annotations

from typing import Any

from wmtp.data.config import Chat, CodeContests, HumanEval, Jsonl, Mbpp, Mutated, PythonSource, TextFiles
from wmtp.evaluation.config import InferenceSpeed, LmEval, PassAtK, Perplexity, Speculative, TokenAccuracy
from wmtp.launchers.config import LocalLauncher
from wmtp.models.config import HfModel, MetaMtpModel, ScratchModel
from wmtp.optim.config import AdamW, AdamW8bit, Muon
from wmtp.plugins.hookspecs import hookimpl
from wmtp.storage.config import FileStorage, HubStorage, PackageStorage
from wmtp.tokenizers.config import Bytes, HfSentencePiece, HfTransformers, OwnTokenizer
from wmtp.tracking.config import JsonlTracker, MLflowTracker, SeveralTrackers, TensorBoardTracker, WandbTracker

__all__ = [
    "wmtp_data_loaders",
    "wmtp_evaluators",
    "wmtp_launchers",
    "wmtp_model_loaders",
    "wmtp_optimizers",
    "wmtp_storages",
    "wmtp_tokenizers",
    "wmtp_trackers",
]


@hookimpl
def wmtp_model_loaders() -> list[type[Any]]:
    """Hugging Face and Meta formats, and new weights."""
    return [HfModel, MetaMtpModel, ScratchModel]


@hookimpl
def wmtp_tokenizers() -> list[type[Any]]:
    """Hugging Face tokenizers, SentencePiece files, and plain bytes."""
    return [HfTransformers, HfSentencePiece, Bytes, OwnTokenizer]


@hookimpl
def wmtp_data_loaders() -> list[type[Any]]:
    """Files of examples, and well-known data sets."""
    return [Jsonl, Chat, Mbpp, CodeContests, HumanEval, PythonSource, TextFiles, Mutated]


@hookimpl
def wmtp_storages() -> list[type[Any]]:
    """Files of this machine and its packages, and the Hugging Face hub."""
    return [FileStorage, PackageStorage, HubStorage]


@hookimpl
def wmtp_optimizers() -> list[type[Any]]:
    """AdamW, also with its state in 8 bits, and Muon."""
    return [AdamW, AdamW8bit, Muon]


@hookimpl
def wmtp_trackers() -> list[type[Any]]:
    """MLflow, TensorBoard, Weights & Biases, several of them, or nothing but ``metrics.jsonl``."""
    return [MLflowTracker, JsonlTracker, TensorBoardTracker, WandbTracker, SeveralTrackers]


@hookimpl
def wmtp_launchers() -> list[type[Any]]:
    """This machine."""
    return [LocalLauncher]


@hookimpl
def wmtp_evaluators() -> list[type[Any]]:
    """Losses, accuracies, decoding speed, correctness of generated code, and others' tasks."""
    return [Perplexity, TokenAccuracy, Speculative, InferenceSpeed, PassAtK, LmEval]
