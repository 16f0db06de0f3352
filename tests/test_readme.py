"""The README: its commands are what CI runs. Its examples are run with those of the other pages, by test_docs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """The first screen holds two commands, and .ci/run has the second to the letter."""
    demo, tests = blocks("sh")
    assert "anyio-channels demo" in demo
    assert tests in (ROOT / ".ci" / "run").read_text()
    assert README.index(tests) < 2500
