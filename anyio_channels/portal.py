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
- a thread that may be interrupted touches no lock that the loop needs, but for one that C takes and releases: an exception
  between taking a ``Condition`` and entering its block would leave it taken for ever.
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


def _taken_lock() -> threading.Lock:
    """Return a lock whose next taker waits until somebody releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


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
        self._token: EventLoopToken | None = None
        self._pending: set[Future[Any]] = set()

    @property
    def is_foreign(self) -> bool:
        """Whether it was opened by a process of which this one is a fork."""
        return self._state in {_OPENING, _OPEN} and self._pid != os.getpid()

    def open(self) -> None:
        """Start the thread and wait until what lives there was entered; its errors are raised.

        What is not closed is closed when the interpreter exits. A closed portal may be opened again. ``RuntimeError`` if it is
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
            self._is_abandoned = False
            self._begun = _taken_lock()
            self._thread = threading.Thread(
                target=self._run, name=f"{self._backend} portal of {self.name}", daemon=True
            )
        try:
            self._thread.start()
            self._begun.acquire()
        except BaseException:
            self._is_abandoned = True
            self._stop()
            raise
        if self._state == _NEW:
            self._raise_error()
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
        self._raise_error()

    def start(
        self,
        call: str,
        function: Callable[..., Awaitable[T]],
        *args: object,
        done: Callable[[Future[T]], object] | None = None,
    ) -> Future[T]:
        """Have ``function`` called in the loop. ``cancel`` cancels the call, and the future; so does closing.

        ``call``: what errors call it. Raises ``RuntimeError`` if an event loop runs in this thread, in a fork, and when not
        open; ``anyio.ClosedResourceError`` when closed. ``done`` is called with the future at the end, in the loop's thread.
        """
        future = self._new_future()
        if done is not None:
            future.add_done_callback(done)
        self._hand_over(call, future, function, args)
        return future

    def call(self, call: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """As ``start``, and wait for the result. An exception that interrupts the wait cancels the call."""
        future = self._new_future()
        answered = _taken_lock()
        future.add_done_callback(lambda _: answered.release())
        try:
            self._hand_over(call, future, function, args)
            answered.acquire()
        except BaseException:
            self.cancel(future)
            raise
        try:
            result: T = future.result()
        except CancelledError:
            raise ClosedResourceError(f"{self.name} was closed") from None
        return result

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a call that ``start`` began, before any call that is made later."""
        self.call_soon(future.cancel)

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have a plain function called in the loop, without waiting; for calls that are under way."""
        if self._token is not None:
            with suppress(RunFinishedError):  # there is nobody left to do it for
                self._token.backend_class.run_sync_soon(function, args, self._token.native_token)

    # The inside

    def _require_own(self) -> None:
        if self.is_foreign:
            raise RuntimeError(
                f"{self.name} was opened in process {self._pid}, and this is a fork of it, process {os.getpid()}: open one in "
                "each process, after the fork (gunicorn: post_fork; Celery: worker_process_init)"
            )

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _new_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.add_done_callback(self._pending.discard)
        return future

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
            self._pending.add(future)
            self.call_soon(self._spawn, future, function, args)

    def _run(self) -> None:
        try:
            run(self._main, backend=self._backend, backend_options=self._backend_options)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that opens or closes
            self._error = error
            if self._state == _OPENING:
                self._state = _NEW
                self._begun.release()
        self._state = _NEW if self._state == _NEW else _CLOSED
        for future in tuple(self._pending):  # handed over too late to begin
            future.cancel()

    async def _main(self) -> None:
        self._token = current_token()
        self._bell = Event()
        async with self._make_resident(), create_task_group() as calls:
            self._calls: TaskGroup = calls
            self._state = _OPEN
            if self._is_abandoned:
                self._bell.set()
            self._begun.release()
            try:
                await self._bell.wait()
            finally:
                with self._lock:
                    self._state = _CLOSED
                calls.cancel_scope.cancel()

    def _stop(self) -> None:
        with self._lock:
            if self._state == _OPEN:
                self.call_soon(self._bell.set)

    def _spawn(self, future: Future[Any], function: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        if self._state == _OPEN:
            self._calls.start_soon(self._answer, future, function, args)

    async def _answer(self, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> None:
        if future.cancelled():
            return
        with CancelScope() as scope:

            def settled(_: Future[T]) -> None:
                if future.cancelled():
                    scope.cancel()

            future.add_done_callback(settled)
            try:
                result = await function(*args)
            except (get_cancelled_exc_class(), GeneratorExit):
                future.cancel()
                raise
            except BaseException as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)  # SystemExit too is for the thread that called
                elif not isinstance(error, Exception):
                    raise
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
