"""One closed list of errors: all that loraspan raises on purpose comes from it."""

import ast
import inspect
from pathlib import Path

import pytest

from loraspan import errors

PACKAGE = Path(__file__).parents[1] / "python" / "loraspan"
FILES = sorted(PACKAGE.rglob("*.py"))
CLASSES = {name: error for name, error in vars(errors).items() if inspect.isclass(error)}
# what Python's own protocols and the command line's library ask for
ELSEWHERE = {"__getattr__": {"AttributeError"}, "__getitem__": {"KeyError", "IndexError"}, "__delitem__": {"KeyError"}}
COMMAND_LINE = {"SystemExit", "click.ClickException", "click.UsageError", "click.BadParameter", "click.exceptions.Exit"}


def raised(source):
    """Every exception made in a ``raise``, with the function it is in and its line."""
    found = []

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            made = node.exc.func
            for choice in (made.body, made.orelse) if isinstance(made, ast.IfExp) else (made,):
                found.append((ast.unparse(choice), function, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def refinements():
    """Classes of the package that add something to an error of the list, and are caught as that error."""
    names = set(CLASSES)
    classes = [
        node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    for _ in classes:
        names |= {node.name for node in classes if names & {ast.unparse(base).split(".")[-1] for base in node.bases}}
    return names


LISTED = refinements()


def foreign(source, allowed=frozenset()):
    """What is raised that is neither of the closed list nor asked for by its place."""
    return [
        f"line {line}: {name}"
        for name, function, line in raised(source)
        if name.split(".")[-1] not in LISTED
        and name not in ELSEWHERE.get(function, set()) | set(allowed)
        # a function that gives an error is judged where it makes one
        and name.split(".")[-1][:1].isupper()
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_closed_list_is_raised(path):
    command_line = path.is_relative_to(PACKAGE / "cli")
    assert not foreign(path.read_text(), COMMAND_LINE if command_line else ())


def test_a_foreign_error_is_seen():
    assert foreign("raise ValueError('no')") == ["line 1: ValueError"]
    assert foreign("raise (ShapeError if x else ValueError)('no')") == ["line 1: ValueError"]
    assert foreign("def f():\n    raise AttributeError(name)") == ["line 2: AttributeError"]
    assert not foreign("def __getattr__(name):\n    raise AttributeError(name)")
    assert not foreign("raise ShapeError('gram: no')\ntry:\n    pass\nexcept OSError:\n    raise")


@pytest.mark.parametrize("name", CLASSES)
def test_each_is_a_loraspan_error_and_says_when(name):
    error = CLASSES[name]
    assert issubclass(error, errors.LoraspanError)
    assert error.__module__ == "loraspan.errors"
    assert error.__doc__
    assert str(error("gram: x needs a row")) == "gram: x needs a row"


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("ShapeError", ValueError),
        ("BackendError", RuntimeError),
        ("FormatError", ValueError),
        ("UnsupportedError", ValueError),
        ("NotFiniteError", ValueError),
        ("MismatchError", ValueError),
        ("UnknownTaskError", KeyError),
        ("StoreError", OSError),
    ],
)
def test_each_is_caught_as_python_would_expect(name, builtin):
    with pytest.raises(builtin):
        raise CLASSES[name]("gram: x needs a row")


def test_a_shape_error_is_an_argument_error():
    assert issubclass(errors.ShapeError, errors.ArgumentError)


def test_an_unknown_task_has_no_quotes_around_its_sentence():
    assert str(errors.UnknownTaskError()) == ""
    assert str(errors.UnknownTaskError("no task 'sql'; there are 'legal'")) == "no task 'sql'; there are 'legal'"
