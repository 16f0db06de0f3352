"""What is installed is what pyproject.toml and the documentation say."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


LAYERS = (
    "BaseChannelLayer ChannelFull ChannelLayerRegistry ChannelLayerStatistics InMemoryChannelLayer Inbox MessageTooLarge "
    "MessagesLost RedisChannelLayer RedisPubSubChannelLayer channel_layers create_channel_layer "
    "create_redis_channel_layer get_channel_layer has_layers register_channel_layer unregister_channel_layer"
)
PATHS = {
    "anyio_channels": f"{LAYERS} __version__",
    "anyio_channels.layers": LAYERS,
    "anyio_channels.layers.base": "BaseChannelLayer ChannelLayerStatistics Inbox Message OnGap Overflow SerializerFormat",
    "anyio_channels.layers.memory": "InMemoryChannelLayer channel_layer",
    "anyio_channels.layers.redis": "RedisChannelLayer RedisLayerStatistics RedisPubSubChannelLayer",
    "anyio_channels.layers.registry": "ChannelLayerRegistry channel_layers create_channel_layer "
    "create_redis_channel_layer get_channel_layer has_layers register_channel_layer unregister_channel_layer",
    "anyio_channels.otel": "CONTEXT_KEY OpenTelemetryChannelLayer message_context",
    "anyio_channels.sync": "SyncChannelLayer SyncInbox",
    "anyio_channels.testing": "CHECKS Check Clock ContractViolation Features LayerFactory contract_machine run_checks",
    "anyio_channels.urls": "Factory create_channel_layer create_redis_channel_layer register_scheme",
    "anyio_channels.wsgi": "AsgiToWsgi WsgiToAsgi",
}
"""The import paths that users have, and what each has for them."""


@pytest.mark.parametrize(("path", "names"), PATHS.items(), ids=PATHS)
def test_public_import_paths(path: str, names: str) -> None:
    """Every public name can be imported from each path that it has, and there are no others."""
    module = importlib.import_module(path)
    assert sorted(module.__all__) == sorted(names.split())
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("anyio_channels.layers.")])
def test_layers_are_the_same_by_whatever_path(path: str) -> None:
    """The paths of fast_channels lead to the same things, and hold nothing of their own."""
    module = importlib.import_module(path)
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == path]
    assert defined == []
    for name in set(module.__all__) & set(anyio_channels.__all__):
        assert getattr(module, name) is getattr(anyio_channels, name)


def test_the_import_paths_are_there_without_being_imported() -> None:
    """After ``import anyio_channels``, ``anyio_channels.layers.memory.channel_layer`` is there."""
    code = (
        "import anyio_channels; print(anyio_channels.layers.memory.channel_layer, anyio_channels.layers.base.Message)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "InMemoryChannelLayer" in result.stdout
