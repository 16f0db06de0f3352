"""The lifespan of an ASGI application, as a block.

Rules (https://asgi.readthedocs.io/en/latest/specs/lifespan.html):
- an application that ends before it has answered ``lifespan.startup`` does not support the protocol, and does without.
- what it puts into ``scope["state"]`` is in the scope of each request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from anyio import CancelScope, Event, create_task_group, sleep_forever

from anyio_channels.log import LIFESPAN_FAILED, LIFESPAN_UNSUPPORTED, said

from .translate import AsgiApplication, Message

__all__ = ["lifespan"]


@asynccontextmanager
async def lifespan(app: AsgiApplication, state: dict[str, Any]) -> AsyncGenerator[None]:
    """Start ``app``, and shut it down at the end of the block. ``RuntimeError`` if it says that either failed."""
    conversation = _Conversation(app, state)
    async with create_task_group() as tasks:
        tasks.start_soon(conversation.run)
        error = await conversation.ask("startup")
        if error is None:
            try:
                yield
            finally:
                with CancelScope(shield=True):
                    error = await conversation.ask("shutdown")
        tasks.cancel_scope.cancel()
    if error is not None:
        raise RuntimeError(error)


class _Conversation:
    """What the server asks, and what the application answers."""

    def __init__(self, app: AsgiApplication, state: dict[str, Any]) -> None:
        self._app = app
        self._scope: Message = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
        self._asked = {"startup": Event(), "shutdown": Event()}
        self._answered = {"startup": Event(), "shutdown": Event()}
        self._failure: str | None = None

    async def ask(self, question: str) -> str | None:
        """Return what went wrong, if the application says so."""
        self._asked[question].set()
        await self._answered[question].wait()
        return self._failure

    async def run(self) -> None:
        """Call the application; what it raises is logged."""
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001 - it is logged, with its traceback
            event = LIFESPAN_FAILED if self._answered["startup"].is_set() else LIFESPAN_UNSUPPORTED
            event.write(app=repr(self._app), error=said(error), exc_info=error)
        finally:
            for answered in self._answered.values():
                answered.set()

    async def _receive(self) -> Message:
        for question, asked in self._asked.items():
            if not self._answered[question].is_set():
                await asked.wait()
                return {"type": f"lifespan.{question}"}
        while True:
            await sleep_forever()

    async def _send(self, message: Message) -> None:
        _, question, outcome = message["type"].split(".")
        if outcome == "failed":
            self._failure = f"{self._app!r:.200} failed at {question}: {message.get('message', '')}"
        self._answered[question].set()
