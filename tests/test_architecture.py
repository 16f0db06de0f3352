"""The walls: who imports whom, and that the package never reaches for a backend.

All of it is computed from the source of the files: imports for type checkers, and those inside functions, count too. Run as a
script, this file rewrites the table of modules in docs/design.md.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest

import anyio_channels

PACKAGE = Path(anyio_channels.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "design.md"
BEGIN, END = "<!-- modules: python tests/test_architecture.py writes this table -->", "<!-- end of modules -->"

# The way down: what stands in a line imports only what stands in lines above it, and itself. A name covers all below it.
LEVELS = (
    ("exceptions", "forks"),
    ("log", "wakeup"),
    ("contract", "portal"),
    ("local",),
    ("hub", "memory"),
    ("redis.client",),
    ("redis", "redis.wire", "redis.duplicates", "redis.servers"),
    ("redis.pubsub", "redis.queue"),
    ("registry", "urls"),
    ("layers",),
    ("anyio_channels",),
    ("demo", "django", "doctor", "otel", "sync", "testing", "wsgi"),
    ("cli",),
)
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}

# What a module may import of others. The longest name that covers it counts.
OTHERS: dict[str, set[str]] = {
    "exceptions": set(),
    "forks": set(),
    "log": set(),
    "wakeup": {"anyio"},
    "portal": {"anyio"},
    "contract": {"anyio"},
    "contract.message": {"ormsgpack"},
    "contract.names": set(),
    "contract.options": set(),
    "local": {"anyio"},
    "local.expiry": set(),
    "hub": set(),
    "memory": {"anyio"},
    "redis.client": {"anyio", "hiredis", "redis"},
    "redis.client.address": {"redis"},
    "redis.client.errors": {"redis"},
    "redis.client.protocol": {"hiredis"},
    "redis.client.replies": set(),
    "redis": {"anyio", "redis"},
    "redis.duplicates": set(),
    "redis.queue.channels": set(),
    "redis.queue.delivery": set(),
    "redis.queue.receiving": set(),
    "redis.queue.scripts": set(),
    "redis.wire": {"cryptography"},
    "registry": set(),
    "urls": set(),
    "layers": set(),
    "anyio_channels": set(),
    "demo": {"anycorn", "anyio", "redis", "starlette"},
    "doctor": {"anyio", "redis"},
    "doctor.figures": set(),
    "doctor.seen": set(),
    "otel": {"anyio", "opentelemetry"},
    "sync": {"anyio"},
    "testing": {"anyio", "hypothesis"},
    "testing.checks": {"anyio"},
    "wsgi": {"anyio"},
    "wsgi.translate": set(),
    "cli": {"anyio", "click", "rich"},
    "cli.running": {"anyio", "click", "redis"},
}
T = TypeVar("T")


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    """Inside the package; of a folder's ``__init__.py`` the name of the folder."""
    folder: str
    """The folder that it is in, or is."""
    purpose: str
    """The first line of its docstring."""
    ours: frozenset[str]
    """The modules of the package that it imports."""
    others: frozenset[str]
    """The top-level names of everything else that it imports."""


def read_package(package: Path) -> dict[str, Module]:
    """Read all files of a package, by name."""
    paths = {_full_name(path, package): path for path in sorted(package.rglob("*.py"))}
    modules: dict[str, Module] = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text("utf-8"))
        folder = name if path.stem == "__init__" else name.rpartition(".")[0]
        imported = _imports(tree, folder)
        ours = {one for names in imported if (one := next((one for one in names if one in paths), None))}
        lost = [names[-1] for names in imported if names[-1].startswith(f"{package.name}.") and not {*names} & {*paths}]
        assert lost == [], f"{name} imports what is not there"
        others = {names[-1].partition(".")[0] for names in imported} - {package.name}
        purpose = (ast.get_docstring(tree) or "").partition("\n")[0]
        short = _short(name, package.name)
        modules[short] = Module(
            short,
            _short(folder, package.name),
            purpose,
            frozenset(_short(one, package.name) for one in ours - {name}),
            frozenset(others - (sys.stdlib_module_names - {"asyncio"})),
        )
    return modules


def _full_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _short(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.")


def _imports(tree: ast.AST, folder: str) -> list[tuple[str, ...]]:
    """Return for each import what it may name: the module ``a.b.c``, or ``c`` in the module ``a.b``."""
    found: list[tuple[str, ...]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}", module) for alias in node.names]
    return found


def circle(modules: Mapping[str, Module]) -> list[str]:
    """Return the modules of one circle, each of which imports the next; none if there is no circle."""
    try:
        TopologicalSorter({name: module.ours for name, module in modules.items()}).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def covering(name: str, table: Mapping[str, T]) -> T:
    """Return the entry of ``table`` for ``name``: the longest that is it, or a folder that it is in."""
    while name not in table:
        assert "." in name, f"{name} has no place in the table"
        name = name.rpartition(".")[0]
    return table[name]


def place_of(name: str) -> str:
    """Return the entry of ``LEVELS`` that covers a module."""
    return covering(name, {entry: entry for entry in LEVEL_OF})


def table_of(modules: Mapping[str, Module]) -> str:
    """Return the table of modules, from the bottom to the top, as the page about the design shows it."""
    # Sorted, so that the order is the same in each run.
    order = list(TopologicalSorter({name: sorted(modules[name].ours) for name in sorted(modules)}).static_order())
    lines = ["| module | what it is | what of ours it imports |", "|---|---|---|"]
    for name in sorted(modules, key=lambda name: (LEVEL_OF[place_of(name)], place_of(name), order.index(name))):
        module = modules[name]
        folder = f"{module.folder}."
        ours = [
            f"`.{one.removeprefix(folder)}`" if one.startswith(folder) else f"`{one}`" for one in sorted(module.ours)
        ]
        purpose = module.purpose.replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}` | {purpose} | {', '.join(ours)} |")
    return "\n".join(lines)


def shown_table(page: str) -> str:
    """Return the table that a page shows."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


MODULES = read_package(PACKAGE)
FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_circle() -> None:
    """No file imports itself, over however many others: each can be read, and tested, with those below it only."""
    assert circle(MODULES) == []


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
def test_imports_point_one_way(module: Module) -> None:
    """A module imports what is below its place and beside it in its folder, and of others what its place allows."""
    place = place_of(module.name)
    level = LEVEL_OF[place]
    upwards = {one for one in module.ours if place_of(one) != place and LEVEL_OF[place_of(one)] >= level}
    assert upwards == set()
    assert module.others <= covering(module.name, OTHERS)


def test_the_client_has_never_heard_of_a_layer() -> None:
    """The Redis client imports nothing of the package but how to wait and how to log."""
    client = [module for name, module in MODULES.items() if place_of(name) == "redis.client"]
    assert len(client) > 5
    imported = {one for module in client for one in module.ours if place_of(one) != "redis.client"}
    assert imported == {"log", "wakeup"}


def test_the_package_does_not_go_through_its_import_paths() -> None:
    """``layers`` is for users: inside the package, only the package's own names lead there."""
    assert {name for name, module in MODULES.items() if "layers" in {place_of(one) for one in module.ours}} == {
        "anyio_channels",
        "layers",
    }


def test_the_page_shows_the_modules() -> None:
    """docs/design.md has the table that the files make; ``python tests/test_architecture.py`` writes it."""
    assert shown_table(PAGE.read_text("utf-8")) == table_of(MODULES)


def test_every_module_says_what_it_is() -> None:
    """The first line of each file's docstring is its line in the table."""
    assert [name for name, module in MODULES.items() if not module.purpose] == []


def test_how_imports_are_found(tmp_path: Path) -> None:
    """Imports for type checkers and inside functions count, relative and absolute ones; the circle is told whole."""
    package = tmp_path / "pack"
    (package / "sub").mkdir(parents=True)
    for name, text in {
        "__init__.py": "from .one import a",
        "one.py": '"""One.\n\nMore."""\nimport json, anyio.abc\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n'
        "    from pack.two import B",
        "two.py": "def f():\n    from .sub import three",
        "sub/__init__.py": "",
        "sub/three.py": "from .. import one\nfrom . import x\nimport pack.two as t",
    }.items():
        (package / name).write_text(text)
    modules = read_package(package)
    assert {name: set(module.ours) for name, module in modules.items()} == {
        "pack": {"one"},
        "one": {"two"},
        "two": {"sub.three"},
        "sub": set(),
        "sub.three": {"one", "sub", "two"},
    }
    assert modules["one"].others == {"anyio"}
    assert modules["one"].purpose == "One."
    found = circle(modules)
    assert found[0] == found[-1]
    assert all(after in modules[before].ours for before, after in pairwise(found))
    (package / "two.py").write_text("from pack.gone import x")
    with pytest.raises(AssertionError, match="two imports what is not there"):
        read_package(package)


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
def test_no_module_reaches_for_a_backend(module: Module) -> None:
    """No asyncio and no trio, anywhere in the package."""
    assert not module.others & {"asyncio", "trio", "sniffio"}


def test_importing_the_package_needs_no_extra() -> None:
    """Importing anyio_channels brings in its two dependencies and no optional one."""
    code = "import sys, anyio_channels; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert {"anyio", "ormsgpack"} <= loaded
    assert not loaded & {
        "hiredis",
        "cryptography",
        "trio",
        "hypothesis",
        "opentelemetry",
        "click",
        "rich",
        "starlette",
        "anycorn",
        "redis",
        "pytest",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_guards_anything(path: Path) -> None:
    """Input is checked by exceptions: an assert is gone under python -O."""
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text.replace(shown_table(text), table_of(MODULES)), "utf-8")
