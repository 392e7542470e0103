"""Answering: engines for CPU and GPU, the chat, the notebook's tables, the page, files of prompts."""
