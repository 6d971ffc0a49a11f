"""Hugging Face hub: models and data sets by their names.

`names` alone is imported without huggingface_hub.
"""
