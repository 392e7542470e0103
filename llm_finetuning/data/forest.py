"""Checks the shape of message trees, and puts them into depth-first order."""

from collections.abc import Callable, Sequence

ROLES = ("prompter", "assistant")


def arrange(
    tree_ids: Sequence[str],
    ids: Sequence[str],
    parents: Sequence[str | None],
    roles: Sequence[str],
    complain: Callable[[int, str], None],
) -> tuple[list[int], list[int]]:
    """Returns (row numbers in depth-first order, row of each row's parent, -1 where there is none).

    Trees stand by first appearance, siblings in row order.

    `complain(row, problem)` is called for a repeated id, an orphan, a parent in another tree, a second root,
    an assistant at the root, two turns in a row by one role, and a cycle. If it does not raise, the tree of
    that row is left out.
    """
    bad = set()

    def report(row: int, problem: str) -> None:
        complain(row, problem)
        bad.add(tree_ids[row])

    rows_by_id = _rows_by_id(ids, report)
    roots, replies, above = _links(tree_ids, parents, roles, rows_by_id, report)
    order = _depth_first([roots[tree] for tree in dict.fromkeys(tree_ids) if tree in roots], replies)
    if len(order) < len(ids):
        _report_cycles(tree_ids, set(order), bad, report)
    return ([row for row in order if tree_ids[row] not in bad] if bad else order), above


def _rows_by_id(ids: Sequence[str], report: Callable[[int, str], None]) -> dict[str, int]:
    rows_by_id = dict(zip(ids, range(len(ids)), strict=True))
    if len(rows_by_id) < len(ids):
        rows_by_id = {}
        for row, name in enumerate(ids):
            if rows_by_id.setdefault(name, row) != row:
                report(row, f"message id {name} appears a second time")
    return rows_by_id


def _links(
    tree_ids: Sequence[str],
    parents: Sequence[str | None],
    roles: Sequence[str],
    rows_by_id: dict[str, int],
    report: Callable[[int, str], None],
) -> tuple[dict[str, int], dict[int, list[int]], list[int]]:
    """Returns (tree id → row of its root, row → rows of its replies, row of each parent or -1)."""
    roots: dict[str, int] = {}
    replies: dict[int, list[int]] = {}
    above = [rows_by_id.get(parent, -1) for parent in parents]
    for row, up in enumerate(above):
        if up >= 0 and tree_ids[up] == tree_ids[row] and roles[up] != roles[row]:
            if up in replies:
                replies[up].append(row)
            else:
                replies[up] = [row]
        elif parents[row] is not None:
            report(row, _wrong_parent(row, parents[row], up, tree_ids, roles))
        else:
            if roles[row] != "prompter":
                report(row, f"the tree starts with role {roles[row]!r}, expected 'prompter'")
            if roots.setdefault(tree_ids[row], row) != row:
                report(row, f"tree {tree_ids[row]} has a second message without a parent")
    return roots, replies, above


def _wrong_parent(row: int, parent: str, up: int, tree_ids: Sequence[str], roles: Sequence[str]) -> str:
    if up < 0:
        return f"orphan: its parent {parent} is not in the source"
    if tree_ids[up] != tree_ids[row]:
        return f"its parent {parent} belongs to another tree ({tree_ids[up]})"
    return f"two messages in a row by the {roles[row]}: it and its parent {parent}"


def _depth_first(roots: list[int], replies: dict[int, list[int]]) -> list[int]:
    order = []
    stack = roots[::-1]
    while stack:
        row = stack.pop()
        order.append(row)
        if row in replies:
            stack.extend(reversed(replies[row]))
    return order


def _report_cycles(
    tree_ids: Sequence[str], reached: set[int], bad: set[str], report: Callable[[int, str], None]
) -> None:
    """Reports rows that no root leads to: in a tree without another fault they stand on or below a cycle."""
    for row, tree in enumerate(tree_ids):
        if row not in reached and tree not in bad:
            report(row, "its parents go round in a circle")
