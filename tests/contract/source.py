"""Reads the source of host code: a hash that changes with its meaning, and the attributes that it sets."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any


def tree_of(obj: Any) -> ast.AST:
    """Syntax tree of a class, function or module."""
    return ast.parse(textwrap.dedent(inspect.getsource(obj)), filename=inspect.getsourcefile(obj) or "<unknown>")


def source_hash(obj: Any) -> str:
    """Of the code alone: comments, docstrings and layout do not count."""
    tree = tree_of(obj)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def assert_unchanged(obj: Any, expected: str, host: str, ours: str, because: str) -> None:
    found = source_hash(obj)
    assert found == expected, (
        f"{obj.__qualname__} is not the one of {host} (hash {found}, was {expected}). Read it again: {because};"
        f" adapt {ours}, then put the new hash here."
    )


def assert_parameters(obj: Any, expected: list[str], ours: str) -> None:
    """`expected` are names in order, "self" and what Ray adds left out; "*" stands for *args, "**" for **kwargs."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = [marks.get(p.kind, p.name) for p in inspect.signature(obj).parameters.values()]
    found = [name for name in found if name not in ("self", "_ray_trace_ctx")]
    assert found == expected, f"{obj.__qualname__} takes {found}, was {expected}; revisit {ours}"


def attributes_set(*functions: Any) -> set[str]:
    """Names x of every `self.x = ...` in the functions."""
    targets = [node for f in functions for node in ast.walk(tree_of(f)) if isinstance(node, ast.Attribute)]
    return {
        t.attr
        for t in targets
        if isinstance(t.ctx, ast.Store) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }


def imports_inside(obj: Any) -> set[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    nodes = [node for node in ast.walk(tree_of(obj)) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "", alias.name) for node in nodes for alias in node.names}
