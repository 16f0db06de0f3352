"""A request body on its way from an ASGI server to the thread that reads it."""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Callable, MutableMapping
from typing import IO, Any, Final

from anyio import Event, from_thread, to_thread
from anyio.lowlevel import EventLoopToken, current_token

from .translate import Receive

__all__ = ["Body", "first_of"]

_READ_SIZE: Final = 64 * 1024
_JOINED_SIZE: Final = 128 * 1024


def first_of(chunks: list[bytes]) -> tuple[bytes, list[bytes]]:
    """Return some of the chunks as one, at least the first, and the others: not all, for joining takes their size again."""
    size = count = 0
    for chunk in chunks:
        size += len(chunk)
        if count and size > _JOINED_SIZE:
            break
        count += 1
    return chunks[0] if count == 1 else b"".join(chunks[:count]), chunks[count:]


class Body:
    """The request body of one request."""

    def __init__(self, receive: Receive, buffer_size: int, *, spool: bool) -> None:
        """Take nothing in yet; ``buffer_size`` and ``spool`` as for ``WsgiToAsgi``."""
        self._receive = receive
        self._buffer_size = buffer_size
        self._spool = spool
        self._token: EventLoopToken = current_token()
        self._lock = threading.Lock()  # of these three
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._is_full = False  # nothing is taken in until the thread has read
        self._complete = False
        self._ended = False
        self._more = Event()
        self._room = Event()
        self._file: io.BufferedRandom | _Input | None = None
        self.length: int | None = None
        """How long it is, if that is known."""

    async def begin(self) -> bool:
        """Take in what must be there before the application is called; return whether the client still is."""
        while not self._complete and (self._buffered <= self._buffer_size or self._spool):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return False
            self._take(message)
            if self._spool and self._buffered > self._buffer_size:
                await self._to_disk()
        if self._complete:
            self.length = self._buffered
            if self._file is not None:
                await self._to_disk()
                self.length = self._file.tell()
                self._file.seek(0)
        return True

    async def _to_disk(self) -> None:
        """Move what is buffered to a temporary file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        chunks, self._chunks, self._buffered, self._is_full = self._chunks, [], 0, False
        await to_thread.run_sync(self._file.writelines, chunks)

    def _take(self, message: MutableMapping[str, Any]) -> None:
        chunk: bytes = message.get("body", b"")
        with self._lock:
            if chunk:
                self._chunks.append(chunk)
                self._buffered += len(chunk)
            self._complete = not message.get("more_body", False)
            self._is_full = self._buffered > self._buffer_size and not self._complete

    async def go_on(self) -> None:
        """Take in the rest, as far as there is room; then wait, and return when the client goes away."""
        while True:
            while self._is_full:
                await self._room.wait()
                self._room = Event()
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return
            self._take(message)
            self._more.set()

    def end(self) -> None:
        """No more will come. Whoever waits for it does no longer."""
        self._ended = True
        self._more.set()

    async def _wait_for_more(self) -> None:
        while not (self._chunks or self._complete or self._ended):
            self._more = Event()
            await self._more.wait()

    def take(self) -> list[bytes]:
        """Return what has come, at least one chunk, and none at the end. In the thread, which waits only if there is nothing."""
        if not self._chunks:
            from_thread.run(self._wait_for_more)
        from_thread.check_cancelled()  # on asyncio, a wait that began after the request was cancelled is not
        with self._lock:
            chunks, self._chunks, self._buffered = self._chunks, [], 0
            was_full, self._is_full = self._is_full, False
        if was_full:
            self._token.backend_class.run_sync_soon(self._room.set, (), self._token.native_token)
        return chunks

    def open(self) -> IO[bytes]:
        """Return what the application reads."""
        if self._file is not None:
            self._file = _Input(self._file.detach(), _READ_SIZE)
            return self._file
        if self._complete:
            return io.BytesIO(b"".join(self._chunks))
        return _Input(_Stream(self.take), _READ_SIZE)

    def close(self) -> None:
        """Remove the temporary file."""
        if self._file is not None:
            self._file.close()


class _Input(io.BufferedReader):
    """Reads everything for any negative size, as ``io.BytesIO`` does."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(-1 if size is None or size < 0 else size)


class _Stream(io.RawIOBase):
    """What has come of a body, read in the thread."""

    def __init__(self, take: Callable[[], list[bytes]]) -> None:
        super().__init__()
        self._take = take
        self._chunks: list[bytes] = []  # the last one first
        self._data = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._data:
            if not self._chunks:
                self._chunks = self._take()[::-1]
            self._data = memoryview(self._chunks.pop() if self._chunks else b"")
        size = min(len(buffer), len(self._data))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size
