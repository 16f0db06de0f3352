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

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Self

__all__ = ["PAGES", "ROOT", "Block", "Runner", "all_blocks", "read_blocks"]

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
_PATIENCE = 120.0
_FORKS = "ignore:This process:DeprecationWarning"  # from 3.12 on; what forks has one thread
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


class Runner:
    """Runs blocks, each in a process of its own, until its ``with`` block ends."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-W", _FORKS, Path(__file__).with_name("run_block.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, block: Block, way: str, directory: Path, redis_url: str) -> None:
        """Run a block in ``directory``; ``AssertionError`` says what was not as the page has it."""
        text = re.sub(r"\b(redis|rediss)((?:\+\w+)*)://localhost(:6379)?\b", rf"redis\2://{redis_url}", block.text)
        if way == "pytest":
            self._run_by_pytest(block, text, directory)
            return
        code, output, errors = self._run_script(block, way, directory, text)
        assert code == 0, f"{block.name} on {way}:\n{output}{errors}"
        assert errors == "", f"{block.name} on {way} complains:\n{errors}"
        if block.output is not None:
            said, due = (_lines(one, block) for one in (output, block.output))
            assert said == due, f"{block.name} on {way} prints:\n{output}"

    def _run_script(self, block: Block, way: str, directory: Path, text: str) -> tuple[int, str, str]:
        output, errors = (Path(tempfile.mkdtemp(dir=directory), name) for name in ("output", "errors"))
        request = {"place": [str(directory), str(output), str(errors)], "script": [block.page, block.line, way, text]}
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], _PATIENCE)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{block.name} on {way}:\n{output.read_text('utf-8')}{errors.read_text('utf-8')}")
        return int(process.stdout.readline()), output.read_text("utf-8"), errors.read_text("utf-8")

    @staticmethod
    def _run_by_pytest(block: Block, text: str, directory: Path) -> None:
        path = directory / "test_block.py"
        path.write_text(text, encoding="utf-8")
        # Only the plugin that the pages ask for: most of the time of such a run would go to loading the others.
        options = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "anyio.pytest_plugin"]
        result = subprocess.run(
            [sys.executable, "-P", "-W", "error", *options, str(path)],
            capture_output=True,
            encoding="utf-8",
            timeout=_PATIENCE,
            cwd=directory,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            check=False,
        )
        assert result.returncode == 0, f"{block.name}:\n{result.stdout}{result.stderr}"
        assert re.search(r"^\d+ passed in", result.stdout, re.MULTILINE), result.stdout


def _lines(output: str, block: Block) -> list[str]:
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    return sorted(lines) if block.in_any_order else lines


def all_blocks() -> Iterator[Block]:
    """All blocks of all pages."""
    for page in PAGES:
        yield from read_blocks(page)
