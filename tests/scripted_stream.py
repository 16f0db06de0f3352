"""A server's end of a byte stream, played by the test: it says when what arrives, and how writing goes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio import Event, create_task_group, fail_after, wait_all_tasks_blocked
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint

from anyio_channels.redis.client import Connection

PATIENCE = 20.0
NAME = "Redis at there:1"


class ScriptedStream(ByteStream):
    """Delivers the chunks it was fed as they are, and keeps what is written, write by write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False
        self._answers: deque[tuple[bytes | Exception, ...]] = deque()
        self._arriving: deque[bytes | Exception] = deque()
        self._change = Event()
        self._stalled = False
        self._write_error: Exception | None = None

    def feed(self, *chunks: bytes | Exception) -> None:
        """Let these arrive, one with each ``receive``; an exception is raised by it."""
        self._arriving.extend(chunks)
        self._changed()

    def answer(self, *chunks: bytes | Exception) -> None:
        """Feed these when the next write begins, or the one after those that are answered so already."""
        self._answers.append(chunks)

    def stall(self) -> None:
        """Let writes hang, as when the other side does not read."""
        self._stalled = True

    def go_on(self, error: Exception | None = None) -> None:
        """Let writes, also those that hang, be done, or fail with ``error``."""
        self._stalled = False
        self._write_error = error
        self._changed()

    async def wrote(self, writes: int = 1) -> None:
        """Wait until so many writes have begun."""
        while len(self.written) < writes:
            await self._change.wait()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await checkpoint()
        while not self._arriving:
            await self._change.wait()
        chunk = self._arriving.popleft()
        if isinstance(chunk, Exception):
            raise chunk
        assert 0 < len(chunk) <= max_bytes
        return chunk

    async def send(self, item: bytes) -> None:
        self.written.append(item)
        if self._answers:
            self.feed(*self._answers.popleft())
        self._changed()
        await checkpoint()
        while self._stalled:
            await self._change.wait()
        if self._write_error is not None:
            raise self._write_error

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True
        await checkpoint()

    def _changed(self) -> None:
        self._change.set()
        self._change = Event()


@asynccontextmanager
async def serving(
    stream: ByteStream,
    *,
    timeout: float = PATIENCE,  # noqa: ASYNC109 - of the connection
    patience: float = PATIENCE,
    on_push: Callable[[list[Any]], object] | None = None,
) -> AsyncIterator[Connection]:
    """A connection that runs while the block does, with everything in it done in time."""
    connection = Connection(stream, NAME, timeout=timeout, on_push=on_push)
    async with in_time(patience), create_task_group() as tasks:
        tasks.start_soon(connection.run)
        yield connection
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def in_time(patience: float = PATIENCE) -> AsyncIterator[None]:
    """A block that is to end by itself."""
    with fail_after(patience):
        yield


async def settle() -> None:
    """Return when everyone else waits."""
    for _ in range(10):  # on asyncio, what comes after them looks only each 0.1 s
        await checkpoint()
    await wait_all_tasks_blocked()
