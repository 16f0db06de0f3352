"""The README: its commands are what CI runs, and its examples do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """The first screen holds two commands, and .ci/run has the second to the letter."""
    demo, tests = blocks("sh")
    assert "anyio-channels demo" in demo
    assert tests in (ROOT / ".ci" / "run").read_text()
    assert README.index(tests) < 2500


@pytest.mark.parametrize("block", blocks("python"), ids=["asyncio", "trio"])
def test_examples(block: str) -> None:
    """Each example runs by itself and prints that both members received."""
    result = subprocess.run([sys.executable, "-P", "-c", block], check=True, capture_output=True, text=True, timeout=60)
    assert sorted(result.stdout.splitlines()) == ["Ada received hello", "Grace received hello"]
    assert result.stderr == ""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks("python", page.read_text())], ids=lambda page: page.stem
)
def test_documentation(page: Path) -> None:
    """Every example of the documentation runs by itself, without a warning."""
    for block in blocks("python", page.read_text()):
        subprocess.run([sys.executable, "-P", "-W", "error", "-c", block], check=True, timeout=120)


def test_links_lead_somewhere() -> None:
    """Every file that the README or a page of the docs links to is there."""
    pages = [ROOT / "README.md", *PAGES]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
