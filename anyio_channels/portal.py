"""An event loop in a thread of its own, which synchronous code calls into.

Rules:
- what lives in the loop (a layer, the lifespan of an application) is entered and left there, by one task. Calls are tasks beside
  it, which are cancelled before it is left.
- each opening is a ``_Life``, with a thread and an event loop of its own; nothing of one is used by the next, which waits for its
  end.
- a life belongs to the process that began it. A fork of that process has the sockets but not the thread: there, calls are
  refused before they touch anything, and closing does nothing.
- it is never called from the thread of an event loop, which it would block.
- a call is handed to the loop without waiting, under the lock that closing takes: whatever was let in is answered, and whoever
  is interrupted while waiting (Ctrl-C) has cancelled his call. anyio's ``BlockingPortal`` promises neither: a call that
  crosses its stopping can wait for ever, and one interrupted while it is being handed over goes on unseen.
- a thread that may be interrupted touches no lock that the loop needs, but for those that C takes and releases: an exception
  between taking a ``Condition`` and entering its block would leave it taken for ever.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any, Final, TypeVar

from anyio import (
    CancelScope,
    ClosedResourceError,
    Event,
    RunFinishedError,
    create_task_group,
    current_effective_deadline,
    get_all_backends,
    get_cancelled_exc_class,
    run,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from .exceptions import in_a_fork
from .log import EVENT_LOOP_FAILED, said

__all__ = ["Portal", "refuse_in_loop"]

T = TypeVar("T")

_OPENING: Final = "opening"
_OPEN: Final = "open"
_CLOSING: Final = "closing"
_ENDED: Final = "ended"


def refuse_in_loop(call: str) -> None:
    """Raise ``RuntimeError`` if an event loop runs a task in this thread, for ``call`` would block it."""
    try:
        current_token()
    except RuntimeError:
        return
    raise RuntimeError(
        f"{call} would block the event loop that runs in this thread: await the asynchronous twin there, "
        "or call it in a worker thread (anyio.to_thread.run_sync)"
    )


class _AlreadyOpenError(RuntimeError):
    """Two threads opened at the same time."""


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
        self._run = partial(run, backend=backend, backend_options=backend_options)
        self._make_resident = make_resident
        self._life: _Life | None = None
        self._renew_lock()

    def _renew_lock(self) -> None:
        self._lock_pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may call in the middle of a call

    @property
    def is_foreign(self) -> bool:
        """Whether it was opened by a process of which this one is a fork."""
        life = self._life
        return life is not None and life.state != _ENDED and life.pid != os.getpid()

    def open(self) -> None:
        """Start the thread and wait until what lives there was entered; its errors are raised.

        What is not closed is closed when the interpreter exits. A closed portal may be opened again, and one that is being closed
        is waited for. ``RuntimeError`` if it is open, here or in the process that this is a fork of;
        ``anyio.ClosedResourceError`` if it is closed meanwhile.
        """
        refuse_in_loop(f"opening {self.name}")
        self._require_own()
        if self._lock_pid != os.getpid():
            self._renew_lock()  # somebody may have held it when this process was forked
        life = self._begin()
        try:
            life.await_begun()
        except BaseException:
            life.stop()
            raise
        if not life.was_open:
            atexit.unregister(self._close_at_exit)
        life.raise_error()
        if not life.was_open:
            raise ClosedResourceError(f"{self.name} was closed while it was being opened")

    def _begin(self) -> _Life:
        while True:
            with self._lock:
                before = self._life
                if before is None or before.state == _ENDED:
                    self._life = life = _Life(self.name, self._make_resident, self._lock)
                    try:
                        life.start(self._run)
                    except BaseException:
                        self._life = before
                        raise
                    atexit.register(self._close_at_exit)
                    return life
                if before.state != _CLOSING:
                    raise _AlreadyOpenError(f"{self.name} is already open")
            before.join()

    def ensure_open(self) -> None:
        """Open it, unless it was closed on purpose; if somebody else is opening it, wait for that."""
        life = self._life
        while life is None or life.state != _OPEN:
            if life is not None and life.is_closed:
                return
            if life is not None and life.state == _OPENING and life.pid == os.getpid():
                refuse_in_loop(f"opening {self.name}")
                life.await_begun()
            else:
                with suppress(_AlreadyOpenError):
                    self.open()
            life = self._life

    def close(self) -> None:
        """Cancel the calls that are under way, leave what lives in the loop, and end the thread.

        Whoever waits for a call, or for opening, gets ``anyio.ClosedResourceError``. Raises what ended the loop before its
        time, once. Closing twice, or in a fork, does nothing.
        """
        life = self._end()
        if life is not None:
            atexit.unregister(self._close_at_exit)
            life.raise_error()

    def _close_at_exit(self) -> None:
        """Close it as the interpreter exits.

        When what lived in the loop was left, the loop's own end is of no consequence any more, and may fail: asyncio ends the
        threads that resolved host names by means of another, which Python 3.12 does not let it start
        (https://github.com/python/cpython/issues/113964).
        """
        life = self._end()
        if life is not None and not life.has_left:
            life.raise_error()

    def _end(self) -> _Life | None:
        """End what is there, and return it."""
        life = self._life
        if life is None or self.is_foreign:
            return None
        refuse_in_loop(f"closing {self.name}")
        life.is_closed = True
        life.stop()
        life.join()
        return life

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
        future: Future[T] = Future()
        if done is not None:
            future.add_done_callback(done)
        self._hand_over(call, future, function, args)
        return future

    def call(self, call: str, function: Callable[..., Awaitable[T]], *args: object, cancels: bool = True) -> T:
        """As ``start``, and wait for the result.

        An exception that interrupts the wait cancels the call, or with ``cancels=False`` leaves it to its end.
        """
        future: Future[T] = Future()
        answered = _taken_lock()
        future.add_done_callback(lambda _: answered.release())
        try:
            self._hand_over(call, future, function, args)
            answered.acquire()
        except BaseException:
            if cancels:
                self.cancel(future)
            raise
        try:
            return future.result()
        except CancelledError:
            raise ClosedResourceError(f"{self.name} was closed") from None
        finally:
            del future  # an exception would refer to itself through it

    def see_to(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Have ``function`` called, without waiting, and without caring what comes of it."""
        with suppress(RuntimeError, ClosedResourceError):
            self._hand_over("", Future(), function, args)

    def cancel(self, future: Future[Any]) -> None:
        """Cancel a call that ``start`` began, before any call that is made later."""
        self.call_soon(future.cancel)

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have a plain function called in the loop, without waiting; for calls that are under way."""
        life = self._life
        if life is not None and life.pid == os.getpid():
            life.call_soon(function, *args)

    def _require_own(self) -> None:
        life = self._life
        if life is not None and self.is_foreign:
            raise in_a_fork(self.name, life.pid)

    def _hand_over(
        self, call: str, future: Future[Any], function: Callable[..., Awaitable[Any]], args: tuple[object, ...]
    ) -> None:
        refuse_in_loop(call)
        self._require_own()
        with self._lock:
            life = self._life
            if life is None or not (life.was_open or life.is_closed):
                raise RuntimeError(f"{self.name} is not open: use it in a 'with' block, or call open() first")
            if life.state != _OPEN:
                raise ClosedResourceError(f"{self.name} is closed")
            life.accept(future, function, args)


class _Life:
    """One opening of a portal, to its end."""

    def __init__(
        self, name: str, make_resident: Callable[[], AbstractAsyncContextManager[object]], lock: threading.RLock
    ) -> None:
        self.name = name
        self.pid = os.getpid()
        self.state = _OPENING
        self.was_open = False
        self.is_closed = False
        """Whether somebody wanted it closed."""
        self.has_left = False
        """Whether what lived in the loop was entered and left, with no error."""
        self._make_resident = make_resident
        self._lock = lock
        self._begun = _taken_lock()
        self._error: BaseException | None = None
        self._token: EventLoopToken | None = None
        # Of the loop, there before whoever uses them.
        self._bell: Event
        self._scope: CancelScope
        self._calls: TaskGroup
        self._pending: set[Future[Any]] = set()
        self._thread: threading.Thread

    # From any thread

    def start(self, run_main: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, args=(run_main,), name=f"portal of {self.name}", daemon=True)
        self._thread.start()

    def await_begun(self) -> None:
        """Wait until it is open, or will not be."""
        self._begun.acquire()
        self._begun.release()

    def stop(self) -> None:
        """Have it end. If it is not open yet, it is cancelled."""
        with self._lock:
            if self.state == _OPEN:
                self.state = _CLOSING
                self.call_soon(self._bell.set)
            elif self.state == _OPENING:
                self.state = _CLOSING
                self.call_soon(self._give_up)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def raise_error(self) -> None:
        """Raise what ended it before its time, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def accept(self, future: Future[Any], function: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        """Take a call, with the lock."""
        self._pending.add(future)
        self.call_soon(self._spawn, future, function, args)

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Have a plain function called in the loop, without waiting, if there is a loop."""
        if self._token is not None:
            with suppress(RunFinishedError):  # there is nobody left to do it for
                self._token.backend_class.run_sync_soon(function, args, self._token.native_token)

    # In its thread

    def _run(self, run_main: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        try:
            run_main(self._main)
        except BaseException as error:  # noqa: BLE001 - it is logged, and raised in the thread that opens or closes
            self._error = error  # for the thread that opens or closes
            if self.was_open and not self.is_closed:
                EVENT_LOOP_FAILED.write(name=self.name, error=said(error), exc_info=error)
        with self._lock:
            self.state = _ENDED
        for future in tuple(self._pending):  # handed over too late to begin
            future.cancel()
        if not self.was_open:
            self._begun.release()

    async def _main(self) -> None:
        self._bell = Event()
        with CancelScope() as self._scope:
            self._token = current_token()
            if self.state == _CLOSING:
                return
            async with self._make_resident(), create_task_group() as self._calls:
                with self._lock:
                    if self.state == _OPENING:
                        self.state = _OPEN
                        self.was_open = True
                if not self.was_open:
                    return
                self._begun.release()
                try:
                    await self._bell.wait()
                finally:
                    with self._lock:
                        self.state = _CLOSING
                    self._calls.cancel_scope.cancel()
        self.has_left = True

    def _give_up(self) -> None:
        self._scope.cancel()

    def _spawn(self, future: Future[Any], function: Callable[..., Awaitable[Any]], args: tuple[object, ...]) -> None:
        if self.state == _OPEN:
            self._calls.start_soon(self._answer, future, function, args)

    async def _answer(self, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> None:
        try:
            if not future.cancelled():
                await self._answer_in_scope(future, function, args)
        finally:
            self._pending.discard(future)
            del future

    async def _answer_in_scope(
        self, future: Future[T], function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> None:
        with CancelScope() as scope:
            future.add_done_callback(partial(_cancel_with, scope))
            try:
                result = await function(*args)
            except get_cancelled_exc_class() as error:
                if current_effective_deadline() == -math.inf:
                    future.cancel()
                    raise
                _fail(future, _own_end(error))
            except GeneratorExit as error:
                _fail(future, _own_end(error))
            except BaseException as error:
                if not _fail(future, error) and not isinstance(error, Exception):
                    raise
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
            finally:
                del future


def _taken_lock() -> threading.Lock:
    """Return a lock whose next taker waits until somebody releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _cancel_with(scope: CancelScope, future: Future[Any]) -> None:
    if future.cancelled():
        scope.cancel()


def _fail(future: Future[Any], error: BaseException) -> bool:
    """Give ``error`` to whoever waits for ``future``, SystemExit too; return whether somebody does."""
    if not future.set_running_or_notify_cancel():
        return False
    future.set_exception(error)
    return True


def _own_end(error: BaseException) -> RuntimeError:
    """What a call raises that ended by what only an event loop should raise: others must not end with it."""
    mistake = RuntimeError(f"the call let out {error!r}, which nobody had asked for")
    mistake.__cause__ = error
    return mistake
