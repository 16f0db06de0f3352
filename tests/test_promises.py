"""Each sentence of the pages that promise something names the tests that hold it, in ``promises.py``."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest
from doc_pages import ROOT
from promises import NO_PROMISE, PROMISES

from anyio_channels import RedisChannelLayer, RedisPubSubChannelLayer
from anyio_channels.wsgi import AsgiToWsgi, WsgiToAsgi

TESTS = ROOT / "tests"
CHECKS = ROOT / "anyio_channels" / "testing" / "checks.py"
_FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_MEASURED = "\n## Beside other adapters\n"
"""What was measured once, up to the end of its page, is no promise."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"*\[(])|(?<=[.!?]\*\*)\s+(?=[A-Z])")
_ITEM = re.compile(r"^ *(?:[-*]|\d+\.) +", re.MULTILINE)


def one_line(text: str) -> str:
    return " ".join(text.split())


def sentences(page: str) -> Iterator[str]:
    """Yield the sentences of a page, and ``row / column: cell`` of its tables; no headings, no code, nothing measured."""
    for block in re.split(r"\n\s*\n", _FENCED.sub("", page.partition(_MEASURED)[0])):
        text = block.strip()
        if text.startswith("|"):
            yield from cells(text)
        elif text and not text.startswith(("#", "<!--")):
            for item in _ITEM.split(text):
                yield from (sentence for sentence in _END.split(one_line(item)) if sentence)


def cells(table: str) -> Iterator[str]:
    """Yield what is in the cells of a table, each with the first cell of its row and column."""
    header, _, *rows = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1])] for row in table.split("\n")
    )
    for first, *others in rows:
        for column, cell in zip(header[1:], others, strict=True):
            if cell:
                yield one_line(" / ".join(filter(None, (first, column))) + ": " + cell)


def entries(text: str) -> dict[str, list[str]]:
    """Read a table of ``promises.py``: sentences, and the tests behind each."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n\s*\n", text.strip()):
        sentence, _, tests = entry.partition("\n    ->")
        key = one_line(sentence)
        assert key not in found, f"twice in promises.py: {key}"
        found[key] = tests.split()
    return found


def existing_tests() -> set[str]:
    """Return the names of all tests as ``file.py::test_name``, and those of the kit's checks."""
    found: set[str] = set()
    for path in (*TESTS.glob("test_*.py"), CHECKS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if path is CHECKS and node.name.startswith("check_"):
                    found.add(node.name)
                elif path is not CHECKS and node.name.startswith("test_"):
                    found.add(f"{path.name}::{node.name}")
    return found


def to_paste(sentence: str) -> str:
    return textwrap.fill(sentence, 116, break_long_words=False, break_on_hyphens=False) + "\n    -> "


pages = pytest.mark.parametrize("page", PROMISES)


@pages
def test_each_sentence_is_in_the_table(page: str) -> None:
    """Each sentence names its tests, or is one of those that promise nothing."""
    known = {**entries(PROMISES[page]), **entries(NO_PROMISE[page])}
    missing = [one for one in sentences((ROOT / page).read_text()) if one not in known]
    assert not missing, f"{page}: add to tests/promises.py, with the tests that hold it:\n\n" + "\n\n".join(
        map(to_paste, missing)
    )


@pages
def test_each_entry_is_on_the_page(page: str) -> None:
    """A sentence that was changed or taken away leaves no entry behind, and none is in both tables."""
    there = list(sentences((ROOT / page).read_text()))
    promised, others = entries(PROMISES[page]), entries(NO_PROMISE[page])
    gone = [one for one in (*promised, *others) if one not in there]
    assert not gone, f"no longer on {page}: take out of tests/promises.py:\n\n" + "\n\n".join(gone)
    assert not promised.keys() & others.keys()
    assert [one for one, tests in others.items() if tests] == []


@pages
def test_each_test_exists(page: str) -> None:
    """Each promise names at least one test, and every test that is named is there."""
    existing = existing_tests()
    for sentence, tests in entries(PROMISES[page]).items():
        assert tests, f"names no test: {sentence}"
        assert set(tests) <= existing, f"no such test: {set(tests) - existing}, for: {sentence}"


def test_defaults_are_those_of_the_page() -> None:
    """The options on the page about Redis are there, with the defaults that it names, in seconds and MiB."""
    page = (ROOT / "docs" / "redis.md").read_text()
    defaults = dict(re.findall(r"^\| `(\w+)` \| (\d+|none|\d+ MiB) \|", page, re.MULTILINE))
    assert {"timeout", "connect_timeout", "keep_alive", "max_message_size", "default"} == set(defaults)
    listed = re.search(r"^Those of channels_redis:(.*?)\. And:", page, re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = set(re.findall(r"`(\w+)`", listed[1]))
    queue, pubsub = (inspect.signature(layer).parameters for layer in (RedisChannelLayer, RedisPubSubChannelLayer))
    assert "hosts" in names
    assert names - set(pubsub) == {"random_prefix_length"}
    assert names - set(queue) == {"on_disconnect", "on_reconnect"}
    for name, said in defaults.items():
        number, _, unit = said.partition(" ")
        expected = None if number == "none" else int(number) * (2**20 if unit else 1)
        assert [queue[name].default, pubsub[name].default] == [expected, expected]


def test_defaults_of_the_adapters() -> None:
    """The options on the page about WSGI have the defaults that it names."""
    page = (ROOT / "docs" / "wsgi.md").read_text()
    defaults = dict(re.findall(r"^\| `(\w+)` \| (\d+|\d+ KiB|`False`) \|", page, re.MULTILINE))
    assert defaults == {"threads": "40", "buffer_size": "256 KiB", "spool": "`False`"}
    options = inspect.signature(WsgiToAsgi).parameters
    assert [options[name].default for name in defaults] == [40, 256 * 1024, False]
    assert "ahead by `buffer_size` (64 KiB) at most" in page
    assert inspect.signature(AsgiToWsgi).parameters["buffer_size"].default == 64 * 1024


def test_how_pages_are_read() -> None:
    """Sentences end where they do; code, headings and rulers are left out; a cell is named by its row and column."""
    page = textwrap.dedent(
        """
        # A heading. Nothing more

        One goes over
        two lines. `two` is 1.5. Is it? Yes.

        - **An item.** It goes on
          here.
        - another

        ```python
        code. More
        ```

        | | left | right |
        |---|---|---|
        | row | a. B | |
        | x | `y` | z |

        ## Beside other adapters

        Faster.
        """
    )
    assert list(sentences(page)) == [
        "One goes over two lines.",
        "`two` is 1.5.",
        "Is it?",
        "Yes.",
        "**An item.**",
        "It goes on here.",
        "another",
        "row / left: a. B",
        "x / left: `y`",
        "x / right: z",
    ]


def test_how_the_table_is_read() -> None:
    """A sentence may be wrapped, and names any number of tests; what is printed to paste is read back."""
    text = "One goes over\ntwo lines.\n    -> test_a.py::test_b\n       check_c\n\nTwo.\n    -> "
    assert entries(text) == {"One goes over two lines.": ["test_a.py::test_b", "check_c"], "Two.": []}
    long = "A sentence " + "that is long " * 30 + "ends."
    assert entries(to_paste(long)) == {long: []}
