"""Habits of the tests themselves, and the list of mistakes that they must notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import MUTANTS, DoesNotApplyError, find

import anyio_channels

TESTS = Path(__file__).parent
PACKAGE = Path(anyio_channels.__file__).parent
MOST_PRIVATE_LINES = 60
"""Tests read what users can read. A helper that reaches for an attribute once, and is used everywhere, is one line."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_the_package() -> set[str]:
    """What the package keeps to itself; others' private names are not its affair."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name) | ast.Name(id=name):
                    names.add(name)
    return {name for name in names if is_private(name)}


def is_ones_own(node: ast.expr) -> bool:
    """Whether it is ``self``, ``cls`` or ``super()``: a class may use what it inherits."""
    match node:
        case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
            return True
    return False


def private_lines(source: str, names: set[str]) -> set[int]:
    """Return the numbers of the lines that reach for one of ``names``, also by ``getattr`` or a patch."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=value, attr=name) if name in names and not is_ones_own(value):
                lines.add(node.end_lineno or node.lineno)
            case ast.ImportFrom(names=found) if any(one.name in names for one in found):
                lines.add(node.lineno)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "delattr") | ast.Attribute(attr="setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if name in names:
                lines.add(node.lineno)
    return lines


def private_uses() -> Iterator[tuple[int, str]]:
    names = private_names_of_the_package()
    for path in sorted(TESTS.rglob("*.py")):
        count = len(private_lines(path.read_text(), names))
        if count:
            yield count, str(path.relative_to(TESTS))


def test_tests_read_what_users_can_read() -> None:
    """Few lines of the tests reach for a private attribute, so tests break where a promise does."""
    uses = sorted(private_uses(), reverse=True)
    total = sum(count for count, _ in uses)
    worst = ", ".join(f"{name} {count}" for count, name in uses[:8])
    assert total <= MOST_PRIVATE_LINES, f"{total} lines reach for a private attribute of the package, most in: {worst}"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("layer._here.clear()", True),
        ("call(layer)._here", True),
        ("self.layer._here", True),
        ("from anyio_channels.otel import _METRICS", True),
        ("monkeypatch.setattr(layer, '_here', None)", True),
        ("getattr(layer, '_here')", True),
        ("self._here", False),
        ("super()._here()", False),
        ("layer.statistics()", False),
        ("layer.__class__", False),
        ("task._log_destroy_pending = False", False),
        ("monkeypatch.setattr(layer, 'send', None)", False),
    ],
)
def test_what_counts(line: str, counts: bool) -> None:
    """What another object of the package keeps to itself, and nothing else."""
    assert bool(private_lines(line, {"_here", "_METRICS"})) is counts


def test_the_list_of_mutants_is_up_to_date() -> None:
    """Each mistake of ``mutants.py`` can still be made: what it replaces is in the package, once."""
    behind: list[str] = []
    for number, mutant in enumerate(MUTANTS, 1):
        try:
            find(mutant, PACKAGE)
        except DoesNotApplyError as error:
            behind.append(f"{number} ({mutant.promise}): {error}")
    assert not behind, "mend tests/mutants.py:\n" + "\n".join(behind)
