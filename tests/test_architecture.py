"""The walls: who may import whom, and that the package never reaches for a backend."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anyio_channels

PACKAGE = Path(anyio_channels.__file__).parent
ALLOWED = {
    "exceptions": set(),
    "log": set(),
    "contract.message": {"exceptions", "ormsgpack", "cryptography"},
    "layers.expiry": set(),
    "wakeup": {"anyio"},
    "layers.mailbox": {"anyio", "wakeup", "layers.expiry"},
    "contract.layer": {"anyio", "exceptions", "layers.base"},
    "layers.base": {"anyio", "exceptions", "wakeup", "contract.layer"},
    "layers.local": {"exceptions", "layers.base", "layers.expiry", "layers.mailbox"},
    "layers.memory": {
        "anyio", "exceptions", "layers.base", "wakeup", "contract.message", "layers.local", "layers.mailbox",
        "log",
    },
    # The client never imports upwards, and has never heard of a layer: "wakeup" is what a thread knows of its loop.
    "redis.client.errors": {"redis"},
    "redis.client.protocol": {"hiredis", "redis.client.errors"},
    "redis.client.connection": {"anyio", "hiredis", "wakeup", "redis.client.errors", "redis.client.protocol"},
    "redis.client.replies": set(),
    "redis.client.address": {"redis"},
    "redis.client.at_each": {"anyio", "redis"},
    "redis.client.server": {
        "anyio", "redis", "redis.client", "redis.client.address", "redis.client.connection", "redis.client.protocol",
    },
    "redis.client.link": {
        "anyio", "hiredis", "log", "redis", "redis.client.connection", "redis.client.errors", "redis.client.protocol",
    },
    "redis.client.sentinel": {
        "anyio", "redis", "redis.client", "redis.client.address", "redis.client.at_each", "redis.client.connection",
        "redis.client.link", "redis.client.server",
    },
    "redis.client.router": {
        "anyio", "redis", "redis.client.address", "redis.client.at_each", "redis.client.link", "redis.client.sentinel",
        "redis.client.server",
    },
    "redis.client.cluster": {
        "anyio", "redis", "redis.client", "redis.client.address", "redis.client.at_each", "redis.client.connection",
        "redis.client.errors", "redis.client.link", "redis.client.protocol", "redis.client.replies", "redis.client.router",
        "redis.client.server",
    },
    "redis.client.subscriptions": {
        "anyio", "redis", "redis.client.connection", "redis.client.link", "redis.client.protocol", "redis.client.router",
    },
    "layers.redis.layer": {
        "anyio", "redis", "wakeup", "layers.base", "contract.message", "layers.local", "layers.mailbox", "log",
        "redis.client",
    },
    # These two are parts of the layer, which they know by its type only.
    "layers.redis.pop": {"anyio", "layers.redis.intake", "layers.redis.scripts", "redis", "redis.client"},
    "layers.redis.notices": {"anyio", "layers.redis.intake", "layers.redis.scripts", "redis.client"},
    "layers.redis.scripts": {"redis.client"},
    "layers.redis.intake": {
        "anyio", "redis", "layers.base", "contract.message", "layers.local", "layers.mailbox", "layers.redis.layer",
        "layers.redis.notices", "layers.redis.pop", "layers.redis.scripts", "layers.redis.twice", "log", "redis.client",
    },
    "layers.redis.queue": {
        "anyio", "exceptions", "redis", "layers.base", "contract.message", "layers.mailbox", "layers.redis.intake",
        "layers.redis.keys", "layers.redis.layer", "layers.redis.scripts", "log", "redis.client",
    },
    "layers.redis.pubsub": {
        "anyio", "redis", "layers.base", "contract.message", "layers.local", "layers.mailbox", "layers.redis.layer",
        "layers.redis.twice", "log", "redis.client",
    },
    "layers.redis.twice": set(),
    "layers.redis.keys": set(),
    # Looking from outside: these know the layers, and no layer knows them.
    "layers.redis.survey": {
        "anyio", "redis", "layers.base", "layers.redis.keys", "layers.redis.layer", "layers.redis.queue", "redis.client",
    },
    "layers.redis.checkup": {
        "anyio", "redis", "layers.redis.keys", "layers.redis.layer", "layers.redis.pop", "layers.redis.queue",
        "layers.redis.scripts", "layers.redis.survey", "redis.client",
    },
    "layers.registry": {"layers.base", "layers.memory", "layers.redis", "redis.client"},
    "otel": {"anyio", "exceptions", "layers.base", "log", "opentelemetry"},
    "portal": {"anyio", "log"},
    "sync": {"anyio", "exceptions", "layers.base", "contract.layer", "portal"},
    "wsgi.translate": set(),
    "wsgi.body": {"anyio", "wsgi.translate"},
    "wsgi.lifespan": {"anyio", "log", "wsgi.translate"},
    "wsgi.to_asgi": {"anyio", "layers.base", "wsgi.body", "wsgi.translate"},
    "wsgi.to_wsgi": {"anyio", "layers.base", "log", "portal", "wsgi.lifespan", "wsgi.translate"},
    "testing.checks": {"anyio", "exceptions", "layers.base"},
    "testing.machine": {"anyio", "exceptions", "hypothesis", "layers.base", "contract.layer", "testing.checks"},
    "cli.__init__": {"cli.commands"},
    "cli.commands": {
        "click", "cli.bench", "cli.demo", "cli.doctor", "cli.groups", "cli.listen", "cli.send", "cli.stats",
    },
    "cli.options": {"click", "layers", "layers.redis"},
    "cli.output": {"anyio", "click", "rich"},
    "cli.running": {"anyio", "click", "cli.options", "cli.output", "redis"},
    "cli.demo": {"anyio", "click", "cli.options", "demo.app", "demo.server", "layers"},
    "cli.listen": {"anyio", "click", "cli.options", "cli.output", "cli.running", "layers", "layers.base", "rich"},
    "cli.send": {"anyio", "click", "cli.options", "cli.output", "cli.running", "exceptions", "layers", "layers.base"},
    "cli.groups": {
        "click", "cli.options", "cli.output", "cli.running", "layers.redis.layer", "layers.redis.survey", "rich",
    },
    "cli.stats": {"anyio", "click", "cli.options", "cli.output", "cli.running", "layers", "layers.redis.survey", "rich"},
    "cli.bench": {"anyio", "click", "cli.options", "cli.output", "cli.running", "layers", "layers.redis.survey", "rich"},
    "cli.doctor": {
        "click", "cli.options", "cli.output", "cli.running", "layers.redis.layer", "layers.redis.checkup", "rich",
    },
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """What a module imports: ours by their name inside the package, others by their top level."""
    parts = ["anyio_channels", *name_of(path).split(".")]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level] if node.level else []
            found.add(".".join([*above, *([node.module] if node.module else [])]))
    ours = {name.removeprefix("anyio_channels.") for name in found if name.startswith("anyio_channels.")}
    others = {name.split(".")[0] for name in found if not name.startswith("anyio_channels")}
    return ours | (others - sys.stdlib_module_names) | (others & {"asyncio"})


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_point_one_way(module: str) -> None:
    """A module imports what its place allows, and nothing else."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    assert imports(path) <= ALLOWED[module]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_reaches_for_a_backend(path: Path) -> None:
    """No asyncio and no trio, anywhere in the package."""
    assert not imports(path) & {"asyncio", "trio", "sniffio"}


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_assert_guards_anything(path: Path) -> None:
    """Input is checked by exceptions: an assert is gone under python -O."""
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
