"""All commands in one.

Rules:
- each module registers nothing by itself; this list is all that there is, in the order in which one needs them.
"""

from __future__ import annotations

from typing import Any, Final

import click

from anyio_channels import __version__

from .bench import bench
from .demo import demo
from .doctor import doctor
from .groups import groups
from .listen import listen
from .options import without_secrets
from .send import group_send, send
from .stats import stats

__all__ = ["cli"]


class _InOrder(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a URL in a wrong place is shown without its password."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            text = error.format_message()
            if (censored := without_secrets(text)) != text:
                raise click.UsageError(censored, error.ctx) from None
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names as they were added, not by the alphabet."""
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="anyio-channels")
def cli() -> None:
    """Channel layers for asyncio, uvloop and trio: look into one, send to it, measure it.

    A layer is named by its URL, as an argument, in --layer or in the environment variable ANYIO_CHANNELS_URL:

    \b
      redis://localhost:6379/0          the queue layer (also rediss://, unix://)
      redis+pubsub://localhost:6379/0   the pub/sub layer
      redis://a:6379,b:6379/0           several servers
      redis+sentinel://a:26379,b:26379/mymaster/0
      redis+cluster://a:6379,b:6379

    Options of the layer follow a question mark: redis://localhost/0?prefix=chat&expiry=30.
    Processes that use channels_redis on the same Redis are seen, heard and reached as well.

    \b
    Examples:
      anyio-channels demo
      export ANYIO_CHANNELS_URL=redis://localhost:6379/0
      anyio-channels doctor
      anyio-channels listen --group room
      anyio-channels group-send room '{"type": "chat.message", "text": "hi"}'

    Exit codes of all commands: 0 done, 1 could not be done, 2 called wrongly, 130 ended by Ctrl-C before it was done.
    """


_COMMANDS: Final[tuple[click.Command, ...]] = (demo, listen, send, group_send, groups, stats, bench, doctor)
for _command in _COMMANDS:
    cli.add_command(_command)
