r"""What a channel and a group may be called, and how many messages a channel holds.

Rules (channel layer specification, with two holes closed):
- a name is a ``str`` shorter than 100 of ASCII letters, digits, ``-``, ``_`` and ``.``. The whole name must match:
  ``"abc\\n"`` and ``"é"``, which the peers accept, are refused.
- a channel name may hold one ``!`` behind its first character, which makes it process-specific. The part up to and
  including the ``!`` is its non-local part; it says which process owns the channel.
- the first pattern that matches a channel decides its capacity.
"""

from __future__ import annotations

import fnmatch
import re
import secrets
from collections.abc import Collection, Mapping
from typing import ClassVar, Final

from anyio_channels.log import shown

from .options import require_count

__all__ = ["Names", "is_of_this_package", "new_process"]

_NAME: Final = "[a-zA-Z0-9._-]+"
_LONGEST_PREFIX: Final = 50
"""What follows a prefix in the name of a channel takes 49 characters at most: the process, ``!``, and 16 at random."""
_PROCESS: Final = re.compile("p[0-9a-f]{31}!")


def new_process() -> str:
    """Return what the names of this process's channels hold: 32 characters, as a peer's, but the first is not a digit."""
    return "p" + secrets.token_hex(16)[1:]


def is_of_this_package(channel: str) -> bool:
    """Whether a process of this package, not of a peer, made the process-specific channel."""
    return _PROCESS.search(channel) is not None


class Names:
    """The part of every layer that checks names and knows capacities."""

    MAX_NAME_LENGTH: ClassVar[int] = 100
    """A name must be shorter than this."""
    channel_name_regex: ClassVar[re.Pattern[str]] = re.compile(rf"{_NAME}(![a-zA-Z0-9._-]*)?")
    """What a whole channel name must match."""
    group_name_regex: ClassVar[re.Pattern[str]] = re.compile(_NAME)
    """What a whole group name must match."""
    invalid_name_error: ClassVar[str] = (
        "{} name must be a str shorter than "
        f"{MAX_NAME_LENGTH} of ASCII letters, digits, hyphens, underscores and periods"
    )
    """The rule for names, with a place for the kind of name."""

    capacity: int
    channel_capacity: list[tuple[re.Pattern[str], int]]

    def match_type_and_length(self, name: object) -> bool:
        """Whether ``name`` is a ``str`` shorter than ``MAX_NAME_LENGTH``."""
        return isinstance(name, str) and len(name) < self.MAX_NAME_LENGTH

    def require_valid_channel_name(self, name: object, receive: bool = False) -> bool:  # noqa: FBT001, FBT002 - the peers' signature
        """Return ``True``, or raise ``TypeError`` naming the value and the rule.

        With ``receive=True`` a process-specific name must end at its ``!``, as the specification asks of servers that
        receive for a whole process.
        """
        if not (self.match_type_and_length(name) and self.channel_name_regex.fullmatch(str(name))):
            rule = self.invalid_name_error.format("Channel")
            raise TypeError(f"{rule}, and at most one '!' behind the first of them; got {shown(name)}")
        if receive and "!" in str(name) and not str(name).endswith("!"):
            raise TypeError(f"Specific channel names in receive() must end at the !; got {name!r}")
        return True

    def require_valid_group_name(self, name: object) -> bool:
        """Return ``True``, or raise ``TypeError`` naming the value and the rule."""
        if not (self.match_type_and_length(name) and self.group_name_regex.fullmatch(str(name))):
            raise TypeError(f"{self.invalid_name_error.format('Group')}; got {shown(name)}")
        return True

    def non_local_name(self, name: str) -> str:
        """Return ``name`` up to and including its ``!``, or all of it if it has none."""
        head, mark, _ = name.partition("!")
        return head + mark

    def _require_valid_prefix(self, prefix: object) -> None:
        if not (isinstance(prefix, str) and len(prefix) <= _LONGEST_PREFIX and self.group_name_regex.fullmatch(prefix)):
            rule = f"prefix must be a str of 1 to {_LONGEST_PREFIX} ASCII letters, digits, hyphens, underscores and periods"
            raise TypeError(f"{rule}; got {shown(prefix)}")

    def _require_valid_exclude(self, exclude: object) -> frozenset[str]:
        if isinstance(exclude, str | bytes) or not isinstance(exclude, Collection):
            raise TypeError(f"exclude must be a collection of channel names, not {shown(exclude)}")
        for name in exclude:
            self.require_valid_channel_name(name)
        return frozenset(exclude)

    def compile_capacities(
        self, channel_capacity: Mapping[str | re.Pattern[str], int]
    ) -> list[tuple[re.Pattern[str], int]]:
        """Return the patterns of ``channel_capacity`` compiled, in order; a ``str`` is a glob."""
        if not isinstance(channel_capacity, Mapping):
            raise TypeError(
                f"channel_capacity must be a mapping of patterns to capacities, not {shown(channel_capacity)}"
            )
        compiled: list[tuple[re.Pattern[str], int]] = []
        for pattern, capacity in channel_capacity.items():
            if not isinstance(pattern, str | re.Pattern) or (
                isinstance(pattern, re.Pattern) and not isinstance(pattern.pattern, str)
            ):
                raise TypeError(
                    "a pattern of channel_capacity must be a glob (str) or a compiled regular expression for str, "
                    f"not {pattern!r}"
                )
            regex = re.compile(fnmatch.translate(pattern)) if isinstance(pattern, str) else pattern
            compiled.append((regex, require_count(f"channel_capacity[{pattern!r}]", capacity)))
        return compiled

    def get_capacity(self, channel: str) -> int:
        """Return the capacity of ``channel``: that of the first pattern it matches, or the layer's."""
        for pattern, capacity in self.channel_capacity:
            if pattern.match(channel):
                return capacity
        return self.capacity
