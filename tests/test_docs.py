"""The documentation: its code does what the pages say, on asyncio and trio; commands and links lead somewhere.

And nothing public is left out of the reference.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, Runner, all_blocks, read_blocks
from redis_server import RedisServer

import anyio_channels

pytestmark = pytest.mark.usefixtures("unmeasured_processes")

BLOCKS = list(all_blocks())
RUN = [(block, way) for block in BLOCKS if block.language == "python" and block.file is None for way in block.ways]
BUILT = {
    "docs/tutorial.md": "test_tutorial.py",
    **dict.fromkeys(
        [
            "docs/howto/own-layer.md",
            "docs/howto/starlette-fastapi.md",
            "docs/howto/testing.md",
            "docs/howto/workers.md",
            "docs/moving/django-channels.md",
        ],
        "test_howto.py",
    ),
}
"""The tests of pages that build a project."""
INTERNAL = {
    "cli", "contract", "demo", "doctor", "exceptions", "forks", "layers", "local", "log", "memory", "portal", "redis",
    "registry", "wakeup",
}  # fmt: skip
"""Modules that hold nothing public but what can be imported from the package itself."""
PUBLIC = [
    "anyio_channels",
    *(
        f"anyio_channels.{one.name}"
        for one in pkgutil.iter_modules(anyio_channels.__path__)
        if one.name not in INTERNAL
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that only the pages use: they take the prefix that they please."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.mark.parametrize(("block", "way"), RUN, ids=[f"{block.name}-{way}" for block, way in RUN])
def test_block(block: Block, way: str, runner: Runner, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each block runs by itself, without a warning, and prints what the page says."""
    address = "no.redis.was.expected"
    if "://localhost" in block.text:
        server: RedisServer = request.getfixturevalue("server")
        with server.client() as client:
            client.flushall()
        address = f"{server.host}:{server.port}"
    runner.run(block, way, tmp_path, address)


def test_pages_have_blocks_that_are_run() -> None:
    """That a page was found and read is seen by one that is known to have some."""
    pages = {block.page for block, _ in RUN}
    assert {"README.md", "docs/sync.md", "docs/testing.md"} <= pages
    assert {"asyncio", "trio", "own", "once"} <= {way for _, way in RUN}


def test_what_is_not_run_says_why() -> None:
    """Each block marked ``py`` has the reason right before it, and no other block has one."""
    silent = [block.name for block in BLOCKS if block.language == "py" and not block.reason and not block.file]
    assert silent == [], "a block that is not run needs '<!-- not run as a test: REASON -->' right before it"
    assert [block.name for block in BLOCKS if block.reason and block.language != "py"] == []
    assert {block.language for block in BLOCKS if "import anyio" in block.text} <= {"python", "py"}


def test_files_are_built_by_a_test() -> None:
    """A page whose blocks are files of a project has a test that builds it."""
    assert {block.page for block in BLOCKS if block.file} == set(BUILT)
    for test in BUILT.values():
        assert (ROOT / "tests" / test).exists()


# The harness itself


def block(text: str, output: str | None = None, *, in_any_order: bool = False) -> Block:
    return Block("docs/page.md", 7, "python", text, output=output, in_any_order=in_any_order)


@pytest.mark.parametrize("way", ["asyncio", "trio"])
def test_the_backend_is_the_one_that_was_asked_for(way: str, runner: Runner, tmp_path: Path) -> None:
    text = """
import anyio, sniffio
from anyio import run
from anyio_channels import InMemoryChannelLayer
from anyio_channels.sync import SyncChannelLayer

async def main():
    print(sniffio.current_async_library())

anyio.run(main)
run(main)
anyio.run(main, backend="asyncio")
with SyncChannelLayer(InMemoryChannelLayer()) as layer:
    layer._portal.call("it", main)
"""
    one = block(text, f"{way}\n{way}\nasyncio\n{way}\n")
    assert one.ways == ["asyncio", "trio"]
    runner.run(one, way, tmp_path, "")


@pytest.mark.parametrize(
    ("text", "output", "complaint"),
    [
        ("print('a')", "b", r"prints:\na"),
        ("print('a'); print('b')", "b\na", r"prints:\na\nb"),
        ("\n1 / 0", None, r'(?s)docs/page.md", line 8.*ZeroDivisionError'),
        ("import warnings; warnings.warn('old', DeprecationWarning)", None, "DeprecationWarning: old"),
        ("import sys; sys.stderr.write('hm')", None, "complains:\nhm"),
        ("async def f(): ...\nf()", None, "never awaited"),
    ],
)
def test_a_block_that_is_wrong_fails(
    text: str, output: str | None, complaint: str, runner: Runner, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        runner.run(block(text, output), "once", tmp_path, "")


def test_lines_in_any_order(runner: Runner, tmp_path: Path) -> None:
    runner.run(block("print('a'); print('b')", "b\na\n", in_any_order=True), "once", tmp_path, "")
    with pytest.raises(AssertionError, match="prints"):
        runner.run(block("print('a'); print('b')", "b\nc\n", in_any_order=True), "once", tmp_path, "")


@pytest.mark.parametrize(("body", "passes"), [("assert True", True), ("assert False", False)])
def test_blocks_with_test_functions_are_run_by_pytest(body: str, passes: bool, runner: Runner, tmp_path: Path) -> None:
    one = block(f"import pytest\n\n\n@pytest.mark.anyio\nasync def test_it():\n    {body}\n")
    assert one.ways == ["pytest"]
    if passes:
        runner.run(one, "pytest", tmp_path, "")
    else:
        with pytest.raises(AssertionError, match="assert False"):
            runner.run(one, "pytest", tmp_path, "")


def test_how_pages_are_read() -> None:
    blocks = read_blocks(ROOT / "README.md")
    assert [block.language for block in blocks[:4]] == ["sh", "sh", "python", "text"]
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[blocks[2].line - 1] == blocks[2].text.splitlines()[0] == "import anyio"
    assert blocks[2].output == blocks[3].text
    assert blocks[2].in_any_order


# Commands


def commands() -> list[tuple[str, str]]:
    """What the pages have people call: the subcommands of the script, and the files."""
    found = set()
    code = [block.text for block in BLOCKS if block.language == "sh"]
    for page in PAGES:
        text = page.read_text("utf-8")
        code += re.findall(r"`([^`\n]+)`", text)
        found |= {("file", name) for name in re.findall(r"\b(?:benchmarks|tests|docs)/[\w/.-]+\.py\b", text)}
    found |= {("command", name) for one in code for name in re.findall(r"\banyio-channels ([a-z][a-z-]*)", one)}
    return sorted(found)


@pytest.mark.parametrize(("kind", "name"), commands())
def test_commands_are_there(kind: str, name: str) -> None:
    """Subcommands of ``anyio-channels`` explain themselves, and the files that pages name exist."""
    if kind == "file":
        assert (ROOT / name).exists()
        return
    command = [sys.executable, "-P", "-W", "error", "-m", "anyio_channels.cli", name, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert name in result.stdout


# Links and the reference


def test_links_lead_somewhere() -> None:
    """Every file that a page links to, or shows, is there; and every heading."""
    prose = {
        page: re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL) for page in PAGES
    }
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s:]+)\)", prose[page])]
    assert links
    lost = []
    for page, link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in headings(target)):
            lost.append((page.name, link))
    assert lost == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("module", PUBLIC)
def test_all_public_names_are_in_the_reference(module: str) -> None:
    """What can be imported is described, under the name by which it is imported."""
    described = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = page.read_text("utf-8")
        described |= set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE))
        for name, where in re.findall(r"^\.\. data:: (\w+)\n   :module: ([\w.]+)", text, re.MULTILINE):
            described.add(f"{where}.{name}")
    names = importlib.import_module(module).__all__
    assert names
    assert [name for name in names if not {f"{module}.{name}", f"anyio_channels.{name}"} & described] == []


def test_the_layers_module_has_no_other_names() -> None:
    """So the reference need not say them twice."""
    assert set(anyio_channels.layers.__all__) == set(anyio_channels.__all__) - {"__version__"}
    for name in anyio_channels.layers.__all__:
        assert getattr(anyio_channels.layers, name) is getattr(anyio_channels, name)


def test_diagrams_are_what_the_script_draws(tmp_path: Path) -> None:
    folder = ROOT / "docs" / "diagrams"
    subprocess.run([sys.executable, "-P", folder / "draw.py", tmp_path], check=True)
    drawn = {picture.name: picture.read_text("utf-8") for picture in tmp_path.glob("*.svg")}
    assert drawn == {picture.name: picture.read_text("utf-8") for picture in folder.glob("*.svg")}
    assert drawn


def test_each_dependency_has_its_reason() -> None:
    """The page about the design says of each what it is for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    lists = [
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    names = {re.split(r"[^\w-]", one)[0] for ones in lists for one in ones if isinstance(one, str)}
    explained = set(re.findall(r"\*\*([\w-]+)\*\*", (ROOT / "docs" / "design.md").read_text("utf-8")))
    assert "anyio" in names
    assert sorted(names - explained - {"coverage"}) == []  # coverage is pytest-cov's own


def test_ci_builds_the_site_as_the_readme_says() -> None:
    command = re.search(
        r"`(\.venv/bin/pip install [^`]* && \.venv/bin/sphinx-build [^`]*)`", (ROOT / "README.md").read_text("utf-8")
    )
    assert command is not None
    assert " -W -n " in command[1]
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()]
    install, build = command[1].split(" && ")
    assert lines.index(install) < lines.index(build)
