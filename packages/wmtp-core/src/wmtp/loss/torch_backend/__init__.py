"""The loss in plain torch operators."""
