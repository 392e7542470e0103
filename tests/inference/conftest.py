"""Fixtures of the page's tests."""

from page_fixtures import busy_machine, serve  # noqa: F401
