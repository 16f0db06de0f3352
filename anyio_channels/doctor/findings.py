"""What a check-up reports: each check, what it found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import redis.exceptions

from anyio_channels.redis.client import IF_NOT_TLS, IF_TLS, IF_UNTRUSTED, NO_CLUSTER, RESP3_NEEDED

from .asking import why

__all__ = ["Finding", "Report", "Verdict", "some", "what_to_do"]

Verdict = Literal["ok", "warning", "wrong", "unknown"]
_EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and what came of it."""

    check: str
    server: str | None
    """Which server; ``None`` for what concerns the whole."""
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty if nothing is to be done."""


class Report:
    """All findings so far, in the order of the checks."""

    def __init__(self) -> None:
        """Start empty."""
        self.findings: list[Finding] = []

    def add(self, check: str, server: str | None, verdict: Verdict, found: str, advice: str = "") -> None:
        """Add a finding; ``advice`` is for those that are not ok."""
        self.findings.append(Finding(check, server, verdict, found, advice if verdict != "ok" else ""))

    def add_unreached(self, server: str | None, error: Exception) -> None:
        """Add that a server, or all of them, cannot be reached."""
        advice = what_to_do(error)
        self.add("reached", server, "wrong", why(error).removesuffix(f"; {advice}").removesuffix(f": {advice}"), advice)


_ADVICE: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (
        redis.exceptions.AuthenticationError,
        "",
        "check user and password in the URL; characters like / ? # [ ] @ in them are percent-encoded",
    ),
    (
        redis.exceptions.NoPermissionError,
        "",
        "allow it (ACL SETUSER): the page about Redis lists the keys, Redis channels and commands that layers need",
    ),
    (
        redis.exceptions.ResponseError,
        "user executing the script",
        "allow the command that is refused besides (ACL SETUSER); the page about Redis lists them",
    ),
    (redis.exceptions.OutOfMemoryError, "", "raise maxmemory, or find out who fills it"),
    (
        redis.exceptions.ReadOnlyError,
        "",
        "give the address of the primary, or use redis+sentinel:// to follow it",
    ),
    *((Exception, one, one) for one in (NO_CLUSTER, RESP3_NEEDED, IF_TLS, IF_NOT_TLS, IF_UNTRUSTED)),
    (redis.exceptions.ResponseError, "", "see what the server means by that; its log may say more"),
    (Exception, "", "check that Redis runs there, host and port are right, and no firewall is between"),
)
"""What to do about an error: the first line that fits its class and its text. Some errors say it themselves."""


def what_to_do(error: Exception) -> str:
    """Return what to do about an error of the ``redis`` package."""
    text = str(error)
    return next(advice for kind, part, advice in _ADVICE if isinstance(error, kind) and part in text)


def some(names: set[bytes]) -> str:
    """Return the first few of ``names``, and how many more there are."""
    shown = ", ".join(repr(name.decode("utf-8", "backslashreplace")) for name in sorted(names)[:_EXAMPLES])
    more = len(names) - _EXAMPLES
    return (shown or "no other") + (f" and {more} more" if more > 0 else "")
