"""Know code by what it says: layouts, comments and docstrings apart."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from loraspan.serve.layer import Served


@functools.lru_cache(maxsize=64)
def body_of(function: Callable[..., Any]) -> str | None:
    """Give the statements of a function as Python would write them, None where its source is not at hand.

    Example:
        >>> body_of(textwrap.dedent).startswith("text = ")
        False
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    statements = definition.body[ast.get_docstring(definition) is not None :]
    return ast.unparse(ast.Module(statements, []))


def same_code(body: str | None, text: str) -> bool:
    """Say whether a body is the code in ``text``.

    Example:
        >>> same_code("return x + 1", "return  x+1  # one more")
        True
    """
    return body == ast.unparse(ast.parse(text))


def plain(module: nn.Module) -> nn.Module:
    """Give the user's module below what is served around it."""
    while isinstance(module, Served):
        module = module.base
    return module
