"""A model's own (native) layers for multi-token prediction.

Their layouts, how they are found in a folder, read and written.
"""
