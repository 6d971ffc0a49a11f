"""WMTP: weighted multi-token-prediction fine-tuning of language models."""

from __future__ import annotations
