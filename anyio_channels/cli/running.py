"""How a command is started and ended.

Rules:
- SIGINT and SIGTERM cancel it, in order: what it has open is closed. One that goes on until then has done its work and exits
  with 0; another exits as the shell says, with 130 or 143.
- what went wrong is one line on standard error and exit code 1; a bug of ours has its traceback.
- what the layers log is shown on standard error.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, NoReturn

import anyio
import click
from anyio import create_task_group, open_signal_receiver

from .options import Choice
from .output import NobodyReads, note, printable

__all__ = ["TROUBLES", "Quiet", "on_event", "opened", "run"]

TROUBLES: tuple[type[Exception], ...] = (OSError,)
"""What can go wrong with nobody at fault here."""
with suppress(ImportError):
    from redis.exceptions import RedisError

    TROUBLES = (OSError, RedisError)

_logger: Final = logging.getLogger("anyio_channels")


class _ToStandardError(logging.Handler):
    """Shows a warning as a line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, if anybody reads it: what is logged must not end what logs it."""
        with suppress(OSError, ValueError):
            note(printable(f"{record.levelname.lower()}: {record.getMessage()}"))


def run(choice: Choice, main: Callable[[], Awaitable[int]], *, endless: bool = False) -> NoReturn:
    """Await ``main`` on the backend of ``choice``, and exit with the code that it returns.

    ``endless``: it is expected to be ended by a signal.
    """
    _logger.handlers[:] = [_ToStandardError()]
    _logger.propagate = False
    _exit(choice, *anyio.run(_supervise, main, endless, backend=choice.backend))


def _exit(choice: Choice, code: int, error: BaseException | None) -> NoReturn:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TROUBLES):
        raise click.ClickException(printable(choice.censor(error))) from error
    if error is not None and not isinstance(error, NobodyReads):
        raise error
    sys.exit(code)


async def _supervise(main: Callable[[], Awaitable[int]], endless: bool) -> tuple[int, BaseException | None]:  # noqa: FBT001
    code = 0
    error: BaseException | None = None

    async def watch(signals: Any, cancel: Callable[[], None]) -> None:
        nonlocal code
        async for number in signals:
            code = 0 if endless else 128 + number
            cancel()

    with open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with create_task_group() as watching:
            async with create_task_group() as working:
                watching.start_soon(watch, signals, working.cancel_scope.cancel)
                try:
                    code = await main()
                except Exception as caught:  # noqa: BLE001 - raised by run(), outside the task groups
                    error = caught
            watching.cancel_scope.cancel()
    return code, error


class _OnEvent(logging.Handler):
    def __init__(self, event: str, call: Callable[[], object]) -> None:
        super().__init__()
        self._event = event
        self._call = call

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "anyio_channels_event", None) == self._event:
            self._call()


@contextmanager
def on_event(event: str, call: Callable[[], object]) -> Generator[None]:
    """Have ``call`` called when an event of that name is logged in the block."""
    handler = _OnEvent(event, call)
    _logger.addHandler(handler)
    try:
        yield
    finally:
        _logger.removeHandler(handler)


class Quiet:
    """What is logged in its block is in the error that is raised, or does not matter."""

    async def __aenter__(self) -> None:
        """Log nothing."""
        _logger.disabled = True

    async def __aexit__(self, *_: object) -> None:
        """Log again."""
        _logger.disabled = False


@asynccontextmanager
async def opened(layer: Any, choice: Choice) -> AsyncGenerator[Any]:
    """Have ``layer`` open for the block; if it cannot be, that is a ``click.ClickException`` that says why."""
    async with AsyncExitStack() as stack:
        try:
            async with Quiet():
                await stack.enter_async_context(layer)
        except TROUBLES as error:
            why = printable(choice.censor(error))
            raise click.ClickException(f"cannot open the layer {choice.shown}: {why}") from error
        yield layer
