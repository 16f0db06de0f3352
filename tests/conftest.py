"""Async tests run on every event loop, or on two where the loops make no difference; the clock is the test's."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, find, settings, strategies
from redis_server import RedisCluster, RedisServer, Sentinels, Spares, new_directory, shared_server

from anyio_channels import InMemoryChannelLayer
from anyio_channels.local.directory import Directory
from anyio_channels.local.hub import Hub

# The same examples every time: what CI finds on one commit, it finds there again. The thorough profile explores.
# A busy machine makes data slowly, which says nothing about the code.
settings.register_profile(
    "fast",
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    max_examples=2000,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--loops", default=",".join(LOOPS), help="the event loops that async tests run on: %(default)s")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run an async test on all loops, unless it chooses its own; a mark says where fewer find as much.

    Which of asyncio's loops a test marked ``two_loops`` gets depends on its name, so a file runs on both, and each time in
    the same way.
    """
    definition = metafunc.definition
    own = [name for mark in definition.iter_markers("parametrize") for name in argument_names(mark)]
    if "anyio_backend" not in metafunc.fixturenames or "anyio_backend" in own:
        return
    names = metafunc.config.getoption("loops").split(",")
    if mark := definition.get_closest_marker("diagonal"):
        arguments, cases, *_ = mark.args
        start = mark.kwargs["start"]
        turns = [(case, names[(start + number) % len(names)]) for number, case in enumerate(cases)]
        params = [
            pytest.param(*case.values, LOOPS[name], id=f"{case.id}-{name}", marks=case.marks) for case, name in turns
        ]
        metafunc.parametrize((*arguments, "anyio_backend"), params, indirect=["anyio_backend"])
        return
    if definition.get_closest_marker("two_loops"):
        alike = [name for name in names if LOOPS[name][0] == "asyncio"]
        chosen = zlib.crc32(metafunc.function.__name__.encode()) % max(1, len(alike))
        names = [name for name in names if name not in alike or name == alike[chosen]]
    metafunc.parametrize("anyio_backend", [LOOPS[name] for name in names], ids=names, indirect=True)


def argument_names(mark: pytest.Mark) -> list[str]:
    """Return the arguments that a ``parametrize`` mark sets."""
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


class Clock:
    """Tells the time that the test set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def layer(clock: Clock) -> InMemoryChannelLayer:
    return InMemoryChannelLayer(clock=clock, capacity=5, expiry=10, group_expiry=100)


def here(layer: Hub) -> Directory:
    """Return the channels and groups that a layer holds in this process, for what statistics() does not count."""
    return layer._here


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, to be counted, filled up, put in trouble and killed."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis that tests share, each with a prefix of its own; who disturbs the server starts another."""
    yield from shared_server(tmp_path_factory)


@pytest.fixture(scope="module")
def unmeasured_processes() -> Iterator[None]:
    """Do not measure coverage in the processes that a module starts: it would find nothing new, and doubles what they cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


# These live as long as a module: an idle cluster takes 2 % of a core, for its nodes greet each other all the time.


@pytest.fixture(scope="module")
def quiet_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A cluster that no test disturbs, and no busy machine: it takes longer than the others to miss a node."""
    with RedisCluster(tmp_path_factory.mktemp("quiet"), node_timeout=5000) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def spare_clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spares[RedisCluster]]:
    parent = tmp_path_factory.mktemp("clusters")
    with Spares(lambda: RedisCluster(new_directory(parent, "cluster"))) as spares:
        yield spares


@pytest.fixture
def cluster(spare_clusters: Spares[RedisCluster]) -> Iterator[RedisCluster]:
    """A cluster of the test's own, to be damaged."""
    with spare_clusters.lend() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quiet_sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """A primary behind Sentinel that no test disturbs."""
    with Sentinels(tmp_path_factory.mktemp("quiet")) as sentinels:
        yield sentinels


@pytest.fixture(scope="module")
def spare_sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spares[Sentinels]]:
    parent = tmp_path_factory.mktemp("sentinels")
    with Spares(lambda: Sentinels(new_directory(parent, "set"))) as spares:
        yield spares


@pytest.fixture
def sentinels(spare_sentinels: Spares[Sentinels]) -> Iterator[Sentinels]:
    """A primary behind Sentinel of the test's own, to be damaged."""
    with spare_sentinels.lend() as sentinels:
        yield sentinels


@pytest.fixture(scope="session", autouse=True)
def _own_options() -> None:
    """How these tests are run is not how the pytest that some of them start is to be run."""
    os.environ.pop("PYTEST_ADDOPTS", None)


@pytest.fixture(scope="module", autouse=True)
def _set_older_objects_aside() -> None:
    """What is there before a module's first test is not its tests' garbage; to search it after each took most of the time."""
    # What Hypothesis keeps from its first use on, it looks for among what is not frozen.
    find(strategies.none(), lambda _: True)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    """A layer or coroutine left open fails the test that left it, not a later one."""
    yield
    gc.collect()
