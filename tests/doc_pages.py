"""The pages of the documentation, and the blocks of code in them.

Rules for who writes a page:
- a block marked ``python`` is run by itself, on asyncio and on trio, with warnings as errors; one that imports either of
  them only there. One with test functions is run by pytest.
- a block marked ``text`` right behind it is what it prints, on each; behind ``<!-- in any order -->`` lines may be shuffled.
- a block marked ``py`` is not run; right before it stands ``<!-- not run as a test: REASON -->``.
- a block behind ``<!-- file: NAME -->`` is a file of a project that the page builds; that page has a test of its own.
- ``redis://localhost`` (any scheme of it, with or without port 6379) is a blank Redis.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

__all__ = ["PAGES", "ROOT", "Block", "all_blocks", "read_blocks", "run"]

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- (?P<words>[^\n]*) -->\n\Z")
_FILE = re.compile(r"file: (?P<name>[\w./]+)")
_NOT_RUN = re.compile(r"not run as a test: (?P<reason>.+)")
_OUTPUT_FOLLOWS = re.compile(r"\s*(?P<shuffled><!-- in any order -->\s*)?\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Of the first line of the code."""
    language: str
    text: str
    comment: str = ""
    """What the HTML comment right before it says."""
    output: str | None = None
    """What it prints, if the page says so."""
    in_any_order: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        found = _FILE.fullmatch(self.comment)
        return found["name"] if found else None

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        found = _NOT_RUN.fullmatch(self.comment)
        return found["reason"] if found else None

    @property
    def ways(self) -> list[str]:
        """How it is run: on which backend unless it names one, by pytest, or, where there is no event loop to choose, once."""
        if re.search(r"^\s*(async )?def test_", self.text, re.MULTILINE):
            return ["pytest"]
        if re.search(r"^\s*(import|from) (asyncio|trio)\b", self.text, re.MULTILINE):
            return ["own"]
        if re.search(r"\brun\(|\bSyncChannelLayer\(|\bAsgiToWsgi\(", self.text):
            return ["asyncio", "trio"]
        return ["once"]


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    found = list(_FENCE.finditer(text))
    return [_make_block(name, text, match, after) for match, after in pairwise([*found, None]) if match is not None]


def _make_block(name: str, text: str, match: re.Match[str], after: re.Match[str] | None) -> Block:
    comment = _COMMENT.search(text[: match.start()])
    output = None
    between = _OUTPUT_FOLLOWS.match(text[match.end() : after.start()]) if after else None
    if after and between and after["language"] in {"text", "console"}:
        output = dedent(after["text"])
    return Block(
        page=name,
        line=text.count("\n", 0, match.start("text")) + 1,
        language=match["language"].strip(),
        text=dedent(match["text"]),
        comment=comment["words"] if comment else "",
        output=output,
        in_any_order=bool(between and between["shuffled"]),
    )


def run(block: Block, way: str, directory: Path, redis_url: str) -> None:
    """Run a block in a process of its own, in ``directory``; ``AssertionError`` says what was not as the page has it."""
    text = re.sub(r"\b(redis|rediss)((?:\+\w+)*)://localhost(:6379)?\b", rf"redis\2://{redis_url}", block.text)
    if way == "pytest":
        path = directory / "test_block.py"
        path.write_text(text, encoding="utf-8")
        arguments = [
            "-m",
            "pytest",
            "-q",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "no:asyncio",
            str(path),
        ]
    else:
        arguments = [str(Path(__file__).with_name("run_block.py")), block.page, str(block.line), way]
    result = subprocess.run(
        [sys.executable, "-P", "-W", "error", *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        cwd=directory,
        check=False,
    )
    assert result.returncode == 0, f"{block.name} on {way}:\n{result.stdout}{result.stderr}"
    if way == "pytest":
        assert re.search(r"^\d+ passed in", result.stdout, re.MULTILINE), result.stdout
        return
    assert result.stderr == "", f"{block.name} on {way} complains:\n{result.stderr}"
    if block.output is not None:
        said, due = (_lines(output, block) for output in (result.stdout, block.output))
        assert said == due, f"{block.name} on {way} prints:\n{result.stdout}"


def _lines(output: str, block: Block) -> list[str]:
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    return sorted(lines) if block.in_any_order else lines


def all_blocks() -> Iterator[Block]:
    """All blocks of all pages."""
    for page in PAGES:
        yield from read_blocks(page)
