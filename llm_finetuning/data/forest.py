"""Checks the shape of message trees, and puts them into depth-first order."""

from collections.abc import Callable, Sequence
from itertools import pairwise, repeat

import numpy as np

ROLES = ("prompter", "assistant")


def arrange(
    tree_ids: Sequence[str],
    ids: Sequence[str],
    parents: Sequence[str | None],
    roles: Sequence[str],
    complain: Callable[[int, str], None],
) -> tuple[Sequence[int], np.ndarray]:
    """Returns (row numbers in depth-first order, (N,) row of each row's parent, -1 where there is none).

    Trees stand by first appearance, siblings in row order. Rows that stand so already come as a range.

    `complain(row, problem)` is called for a repeated id, an orphan, a parent in another tree, a second root,
    an assistant at the root, two turns in a row by one role, and a cycle. If it does not raise, the tree of
    that row is left out.
    """
    bad = set()

    def report(row: int, problem: str) -> None:
        complain(row, problem)
        bad.add(tree_ids[row])

    rows_by_id = _rows_by_id(ids, report)
    up = np.fromiter(map(rows_by_id.get, parents, repeat(-1)), dtype=np.int64, count=len(parents))
    if not bad and _are_sound(tree_ids, parents, roles, up):
        return range(len(ids)) if _are_in_order(up) else _in_order(up.tolist()), up
    roots, replies = _links(tree_ids, parents, roles, up.tolist(), report)
    order = _depth_first([roots[tree] for tree in dict.fromkeys(tree_ids) if tree in roots], replies)
    if len(order) < len(ids):
        _report_cycles(tree_ids, set(order), bad, report)
    return ([row for row in order if tree_ids[row] not in bad] if bad else order), up


def _are_sound(tree_ids: Sequence[str], parents: Sequence[str | None], roles: Sequence[str], up: np.ndarray) -> bool:
    """Whether each row is the only root of its tree, a prompter's, or replies to a row before it by the other role."""
    trees, role = (np.asarray(values, dtype=object) for values in (tree_ids, roles))
    below, roots = np.flatnonzero(up >= 0), np.flatnonzero(up < 0)
    replies = (trees[below] == trees[up[below]]).all() and (role[below] != role[up[below]]).all()
    replies = replies and (up < np.arange(len(up))).all()
    alone = len(set(trees[roots])) == len(roots) == parents.count(None)
    return bool(replies and alone and (role[roots] == ROLES[0]).all())


def _are_in_order(up: np.ndarray) -> bool:
    """Whether rows that stand behind their parents stand in depth-first order.

    They do if none is more than a step deeper than the row before it, and each has the last row that is one step less
    deep for its parent: that one is the row before, or an ancestor of it.
    """
    depth = depths(up)
    if (np.diff(depth, prepend=-1) > 1).any():
        return False
    few_bits = np.min_scalar_type(depth.max(initial=0))  # numpy sorts them much sooner
    by_depth = np.argsort(depth.astype(few_bits), kind="stable")
    levels = np.split(by_depth, np.flatnonzero(np.diff(depth[by_depth])) + 1)
    return all((parents[np.searchsorted(parents, rows) - 1] == up[rows]).all() for parents, rows in pairwise(levels))


def depths(up: np.ndarray) -> np.ndarray:
    """Returns (N,) how many ancestors each row has; up: (N,) row of its parent, -1 at a root."""
    up, depth = np.append(up, -1), np.append((up >= 0).astype(np.int64), 0)
    while (up >= 0).any():  # with every round of each row an ancestor twice as far away
        depth += depth[up]
        up = up[up]
    return depth[:-1]


def _in_order(above: list[int]) -> list[int]:
    """Returns the rows of a forest, each of which stands behind its parent, in depth-first order."""
    size = [1] * len(above)
    for row in range(len(above) - 1, -1, -1):
        if above[row] >= 0:
            size[above[row]] += size[row]
    order, free = [0] * len(above), [0] * (len(above) + 1)  # the next free place below each row; the last: of a root
    for row, up in enumerate(above):
        place = free[up]
        order[place], free[row], free[up] = row, place + 1, place + size[row]
    return order


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
    above: list[int],
    report: Callable[[int, str], None],
) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Returns (tree id → row of its root, row → rows of its replies)."""
    roots: dict[str, int] = {}
    replies: dict[int, list[int]] = {}
    for row, up in enumerate(above):
        if up >= 0 and tree_ids[up] == tree_ids[row] and roles[up] != roles[row]:
            replies.setdefault(up, []).append(row)
        elif parents[row] is not None:
            report(row, _wrong_parent(row, parents[row], up, tree_ids, roles))
        else:
            if roles[row] != "prompter":
                report(row, f"the tree starts with role {roles[row]!r}, expected 'prompter'")
            if roots.setdefault(tree_ids[row], row) != row:
                report(row, f"tree {tree_ids[row]} has a second message without a parent")
    return roots, replies


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
