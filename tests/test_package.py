"""What is installed is what pyproject.toml and the documentation say."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import anyio_channels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = importlib.metadata.metadata("anyio_channels")


def test_version() -> None:
    """The version stands in one place, and is the one that is installed; it is one of Semantic Versioning."""
    assert INSTALLED["Version"] == anyio_channels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:\.?(?:a|b|rc|dev)\d+)?", anyio_channels.__version__)


def test_metadata() -> None:
    """The Pythons that CI runs are those that are named, the type information is there, and so are all extras."""
    named = {name for name in INSTALLED.get_all("Classifier") or () if re.search(r":: 3\.\d+$", name)}
    others = re.findall(r"^declare -A constraints=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[0]
    tested = {"3.11", *re.findall(r"\[([\d.]+)\]", others)}
    assert named == {f"Programming Language :: Python :: {version}" for version in tested}
    assert INSTALLED["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    assert set(INSTALLED.get_all("Provides-Extra") or ()) == set(PROJECT["optional-dependencies"])
    assert INSTALLED["License-Expression"] == "MIT"
    assert (importlib.resources.files("anyio_channels") / "py.typed").is_file()


def test_lowest_versions() -> None:
    """Each dependency has a lowest version, and .ci/lowest.py makes a constraint of each: CI runs the tests with those."""
    result = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "lowest.py")], check=True, capture_output=True, text=True, timeout=60
    )
    constraints = dict(line.split("==") for line in result.stdout.splitlines())
    assert {"anyio", "trio", "redis", "hiredis", "ormsgpack", "hypothesis"} <= constraints.keys()
    assert f"anyio>={constraints['anyio']}" in PROJECT["dependencies"]


def test_importing_needs_no_extra() -> None:
    """Importing the package imports no optional dependency, and none of the backends."""
    code = "import sys, anyio_channels; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    loaded = set(result.stdout.split())
    assert "anyio_channels" in loaded
    extras = {"redis", "hiredis", "cryptography", "trio", "hypothesis", "click", "rich", "starlette", "opentelemetry"}
    assert loaded & extras == set()
