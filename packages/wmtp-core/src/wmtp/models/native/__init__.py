"""A model's own layers for multi-token prediction: their layouts, how they are found in a folder, read and written."""
