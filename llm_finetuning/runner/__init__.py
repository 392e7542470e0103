"""Runs the notebooks headless and in order, each only when something that it depends on has changed."""
