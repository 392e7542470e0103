"""Beneath chat.py: the engines that answer, and where people ask: notebook, page, files of prompts."""
