"""Measuring a model on held-out conversations."""
