"""An event loop in a thread of its own, which synchronous code calls into.

Rules:
- what lives in the loop (a layer, the lifespan of an application) is entered and left there, by one task. Calls are tasks beside
  it, which are cancelled before it is left.
- a portal belongs to the process that opened it. A fork of that process has the sockets but not the thread: there, calls are
  refused before they touch anything, and closing does nothing.
- it is never called from the thread of an event loop, which it would block.
- a call is handed to the loop without waiting, under the lock that closing takes: whatever was let in is answered, and whoever
  is interrupted while waiting (Ctrl-C) has cancelled his call. anyio's ``BlockingPortal`` promises neither: a call that
  crosses its stopping can wait for ever, and one interrupted while it is being handed over goes on unseen.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Final, TypeVar

from anyio import (
    CancelScope,
    ClosedResourceError,
    Event,
    RunFinishedError,
    create_task_group,
    get_all_backends,
    get_cancelled_exc_class,
    run,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

__all__ = ["Portal", "refuse_in_loop"]

T = TypeVar("T")

_NEW: Final = "not open"
_OPENING: Final = "opening"
_OPEN: Final = "open"
_CLOSED: Final = "closed"


def refuse_in_loop(call: str) -> None:
    """Raise ``RuntimeError`` if an event loop runs in this thread, for ``call`` would block it."""
    try:
        current_token()
    except RuntimeError:
        return
    raise RuntimeError(
        f"{call} would block the event loop that runs in this thread: await the asynchronous twin there, "
        "or call it in a worker thread (anyio.to_thread.run_sync)"
    )


class Portal:
    """One event loop in one thread, for callers in any number of threads."""

    def __init__(
        self,
        name: str,
        make_resident: Callable[[], AbstractAsyncContextManager[object]],
        backend: str,
        backend_options: dict[str, Any] | None,
    ) -> None:
        """``name``: what errors call it. ``make_resident``: returns what lives in the loop, each time it is opened."""
        if backend not in get_all_backends():
            choices = ", ".join(map(repr, get_all_backends()))
            raise ValueError(f"backend must be one of {choices}, not {backend!r}")
        self.name = name
        self._make_resident = make_resident
        self._backend = backend
        self._backend_options = backend_options
        self._pid = 0
        self._state = _NEW
        self._lock = threading.Lock()
        self._first = threading.Lock()
        self._error: BaseException | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether it was opened by a process of which this one is a fork."""
        return self._state != _NEW and self._pid != os.getpid()

    def open(self) -> None:
        """Start the thread and wait until what lives there was entered; its errors are raised.

        What is not closed is closed when the process exits. A closed portal may be opened again. ``RuntimeError`` if it is
        open, here or in the process that this is a fork of.
        """
        refuse_in_loop(f"opening {self.name}")
        self._require_own()
        with self._lock:
            if self._state in {_OPENING, _OPEN}:
                raise RuntimeError(f"{self.name} is already open")
            self._state = _OPENING
            self._pid = os.getpid()
            self._error = None
            self._started: Future[None] = Future()
            self._thread = threading.Thread(
                target=self._run, name=f"{self._backend} portal of {self.name}", daemon=True
            )
        try:
            self._thread.start()
            self._started.result()
        except BaseException:
            # It did not start, or the caller was interrupted and it will.
            self._started.add_done_callback(lambda _: self._stop())
            raise
        atexit.register(self.close)

    def ensure_open(self) -> None:
        """Open it if it never was; threads that come meanwhile wait for that."""
        if self._state != _OPEN:
            with self._first:
                if self._state == _NEW:
                    self.open()

    def close(self) -> None:
        """Cancel the calls that are under way, leave what lives in the loop, and end the thread.

        Whoever waits for a call gets ``anyio.ClosedResourceError``. Raises what ended the loop before its time, once.
        Closing twice, or in a fork, does nothing.
        """
        if self._state == _NEW or self.is_foreign:
            return
        refuse_in_loop(f"closing {self.name}")
        self._stop()
        self._thread.join()
        atexit.unregister(self.close)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def start(self, call: str, function: Callable[..., Awaitable[T]], *args: object) -> Future[T]:
        """Have ``function`` called in the loop. Cancelling the future cancels the call, and so does closing.

        ``call``: what errors call it. Raises ``RuntimeError`` if an event loop runs in this thread, in a fork, and when not
        open; ``anyio.ClosedResourceError`` when closed.
        """
        future: Future[T] = Future()
        self._hand_over(call, future, function, args)
        return future

    def call(self, call: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """As ``start``, and wait for the result. An exception that interrupts the wait cancels the call."""
        future: Future[T] = Future()
        try:
            self._hand_over(call, future, function, args)
            return future.result()
        except CancelledError:
            raise ClosedResourceError(f"{self.name} was closed") from None
        finally:
            future.cancel()

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have a plain function called in the loop, without waiting; for calls that are under way."""
        with suppress(RunFinishedError):  # there is nobody left to do it for
            self._token.backend_class.run_sync_soon(function, args, self._token.native_token)

    # The inside

    def _require_own(self) -> None:
        if self.is_foreign:
            raise RuntimeError(
                f"{self.name} was opened in process {self._pid}, and this is a fork of it, process {os.getpid()}: open one in "
                "each process, after the fork (gunicorn: post_fork; Celery: worker_process_init)"
            )

    def _hand_over(
        self, call: str, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> None:
        refuse_in_loop(call)
        self._require_own()
        with self._lock:
            if self._state == _CLOSED:
                raise ClosedResourceError(f"{self.name} is closed")
            if self._state != _OPEN:
                raise RuntimeError(f"{self.name} is not open: use it in a 'with' block, or call open() first")
            self.call_soon(self._spawn, future, function, args)

    def _run(self) -> None:
        try:
            run(self._main, backend=self._backend, backend_options=self._backend_options)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that opens or closes
            if self._started.done():
                self._state = _CLOSED
                self._error = error
            else:
                self._state = _NEW
                self._started.set_exception(error)

    async def _main(self) -> None:
        self._token: EventLoopToken = current_token()
        self._bell = Event()
        async with self._make_resident(), create_task_group() as calls:
            self._calls: TaskGroup = calls
            self._state = _OPEN
            self._started.set_result(None)
            try:
                await self._bell.wait()
            finally:
                with self._lock:
                    self._state = _CLOSED
                # Behind all calls that were let in.
                reached = Event()
                self.call_soon(reached.set)
                with CancelScope(shield=True):
                    await reached.wait()
                calls.cancel_scope.cancel()

    def _stop(self) -> None:
        with self._lock:
            if self._state == _OPEN:
                self.call_soon(self._bell.set)

    def _spawn(self, future: Future[Any], function: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        if not future.cancelled():
            self._calls.start_soon(self._answer, future, function, args)

    async def _answer(self, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> None:
        with CancelScope() as scope:

            def settled(_: Future[T]) -> None:
                if future.cancelled():
                    self.call_soon(scope.cancel)

            future.add_done_callback(settled)
            try:
                result = await function(*args)
            except get_cancelled_exc_class():
                future.cancel()
                raise
            except BaseException as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
