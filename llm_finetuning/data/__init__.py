"""Beneath oasst.py and data_prep.py: reading exports, filters, recipes, duplicates, leaks, reports."""
