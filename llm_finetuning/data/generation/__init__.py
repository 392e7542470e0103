"""Pairs that a generator model writes for a task that is described in a few sentences."""
