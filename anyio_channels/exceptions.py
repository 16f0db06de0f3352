"""What only this package can raise.

Everything else is an exception users of anyio already know: ``ClosedResourceError`` after closing, ``WouldBlock``
from a ``*_nowait`` function that found nothing, ``TypeError`` and ``ValueError`` for input that breaks a rule.
"""

from __future__ import annotations

import os

__all__ = ["ChannelFull", "MessageTooLarge", "MessagesLost"]


class ChannelFull(Exception):  # noqa: N818 - the name the channel layer specification gives it
    """The channel holds as many unexpired messages as its capacity allows.

    Raised by ``send`` and ``send_nowait``, never by ``group_send``. Nothing was sent. Also an attribute of every
    layer (``layer.ChannelFull``), as the channel layer specification asks.
    """


class MessageTooLarge(Exception):  # noqa: N818 - the name the channel layer specification gives it
    """The encoded message is longer than the layer's ``max_message_size``.

    Nothing was sent. Also an attribute of every layer (``layer.MessageTooLarge``).
    """


class MessagesLost(Exception):  # noqa: N818 - says what happened, as ChannelFull does
    """An inbox opened with ``on_gap="raise"`` missed messages here, in the order of those it received.

    The inbox stays open: the next ``receive`` goes on with the message behind the gap.
    """

    missed: int | None
    """How many messages were missed, or ``None`` where nobody can know."""

    def __init__(self, missed: int | None) -> None:
        """Keep the count beside the sentence made from it."""
        super().__init__(missed)
        self.missed = missed

    def __str__(self) -> str:
        """Say how many, in words."""
        if self.missed is None:
            return "messages were missed here, how many is not known"
        return f"{self.missed} message{'s were' if self.missed != 1 else ' was'} missed here"


def in_a_fork(name: object, pid: int) -> RuntimeError:
    """Return the error for using what process ``pid`` opened, which errors call ``name``, in a fork of that process."""
    return RuntimeError(
        f"{name} was opened in process {pid}, and this is a fork of it, process {os.getpid()}: open one in each process, "
        "after the fork (gunicorn: post_fork; Celery: worker_process_init)"
    )
