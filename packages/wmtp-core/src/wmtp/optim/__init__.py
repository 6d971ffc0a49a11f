"""Optimizers: what they are built from, schedules and gradients."""
