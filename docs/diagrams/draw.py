"""Draws the pictures of docs/how-it-travels.md next to itself, or elsewhere: ``python docs/diagrams/draw.py [FOLDER]``.

Rules:
- the standard library only; a picture is boxes, frames around them, and arrows with a number that the page explains.
- colours are variables of the SVG, which a reader's dark mode changes; each picture brings its own background.
"""

from __future__ import annotations

import sys
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
STYLE = """
svg { --paper: #ffffff; --ink: #24292f; --quiet: #59636e; --line: #8b949e; --task: #e3efff; --task-edge: #4a7fc1;
  --store: #fdf0d5; --store-edge: #b07d1a; --frame: #f6f8fa; --badge: #24292f; --badge-ink: #ffffff; }
@media (prefers-color-scheme: dark) { svg { --paper: #16181d; --ink: #e2e6ec; --quiet: #a5aebb; --line: #7d8794;
  --task: #1d3350; --task-edge: #5b97de; --store: #403216; --store-edge: #d3a03c; --frame: #1f232a; --badge: #e2e6ec;
  --badge-ink: #16181d; } }
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); text-anchor: middle; }
.code { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; }
.quiet { fill: var(--quiet); font-size: 12px; }
.title { font-weight: 600; text-anchor: start; }
.frame { fill: var(--frame); stroke: var(--line); stroke-dasharray: 5 4; }
.task { fill: var(--task); stroke: var(--task-edge); }
.store { fill: var(--store); stroke: var(--store-edge); }
.arrow { fill: none; stroke: var(--ink); stroke-width: 1.5; marker-end: url(#head); }
.badge { fill: var(--badge); }
.number { fill: var(--badge-ink); font-size: 11px; font-weight: 600; }
"""
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" style="fill: var(--ink)"/></marker></defs>'
)


class Picture:
    """An SVG in the making."""

    def __init__(self, title: str, height: int, width: int = 780) -> None:
        """Begin with the background and the head of arrows."""
        self.badges: list[str] = []
        """The numbers, which lie on top of everything."""
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            HEAD,
            f'<rect width="{width}" height="{height}" rx="8" style="fill: var(--paper)"/>',
        ]

    def frame(self, x: int, y: int, width: int, height: int, title: str) -> None:
        """Draw what holds others: a process, a Redis."""
        self.parts.append(f'<rect class="frame" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>')
        self.parts.append(f'<text class="title" x="{x + 12}" y="{y + 21}">{escape(title)}</text>')

    def box(self, x: int, y: int, width: int, height: int, kind: str, *lines: str) -> None:
        """Draw a ``task`` or a ``store``; lines that begin with a backquote are code, with ``-`` quiet."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        top = y + height / 2 - (len(lines) - 1) * 8.5 + 4.5
        for number, line in enumerate(lines):
            self.say(x + width / 2, top + 17 * number, line)

    def say(self, x: float, y: float, line: str) -> None:
        """Write a line around ``x``."""
        kind = {"`": "code", "-": "quiet"}.get(line[:1], "")
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(line[1:] if kind else line)}</text>')

    def arrow(self, number: str, *points: tuple[int, int], badge: tuple[int, int] | None = None) -> None:
        """Draw an arrow through the points, with its number on the middle of the longest part, or at ``badge``."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="arrow" d="M{path}"/>')
        if not number:
            return
        pairs = pairwise(points)
        (x1, y1), (x2, y2) = max(pairs, key=lambda pair: abs(pair[0][0] - pair[1][0]) + abs(pair[0][1] - pair[1][1]))
        x, y = badge or ((x1 + x2) // 2, (y1 + y2) // 2)
        self.badges.append(f'<circle class="badge" cx="{x}" cy="{y}" r="9"/>')
        self.badges.append(f'<text class="number" x="{x}" y="{y + 4}">{number}</text>')

    def write(self, name: str) -> None:
        """Write the file."""
        (FOLDER / f"{name}.svg").write_text("\n".join([*self.parts, *self.badges, "</svg>", ""]), encoding="utf-8")


MAILBOX = ("-oldest first, at most capacity,", "-each with its time to expire", "`bytes | bytes | bytes")
KEY = ("`asgispecific.B!", "-all channels of process B", "-share this key")


def draw_memory() -> None:
    """One process."""
    picture = Picture("How a message travels in the in-memory layer", 250)
    picture.frame(15, 15, 750, 220, "One process")
    picture.box(35, 60, 150, 60, "task", "`await send(…)", "-any thread or loop")
    picture.box(35, 150, 150, 60, "task", "`send_nowait(…)", "-also without a loop")
    picture.box(
        280,
        75,
        210,
        120,
        "store",
        "mailbox of the channel",
        "-oldest first, at most capacity,",
        "-each with its time to expire",
        "`bytes | bytes | bytes",
    )
    picture.box(585, 60, 160, 60, "task", "`await receive(…)", "-has waited longest")
    picture.box(585, 150, 160, 60, "task", "`await receive(…)", "-waits behind it")
    picture.arrow("1", (185, 90), (230, 90), (230, 120), (280, 120), badge=(230, 105))
    picture.arrow("1", (185, 180), (230, 180), (230, 150), (280, 150), badge=(230, 165))
    picture.arrow("2", (490, 90), (585, 90), badge=(532, 78))
    picture.arrow("3", (490, 110), (585, 110), badge=(532, 122))
    picture.write("memory")


def draw_queue() -> None:
    """Through a sorted set."""
    picture = Picture("How a message travels in the queue layer", 330)
    picture.frame(15, 15, 170, 300, "Process A")
    picture.box(30, 60, 140, 56, "task", "`await send(…)", "-from any task")
    picture.box(30, 170, 140, 66, "task", "one connection", "-for all commands", "-of the process")
    picture.frame(250, 15, 200, 300, "Redis")
    picture.box(265, 60, 170, 76, "task", "script: send", "-is there room?", "-time: the server's")
    picture.box(
        265,
        185,
        170,
        100,
        "store",
        "sorted set by time",
        "`asgispecific.B!",
        "-all channels of process B",
        "-share this key",
    )
    picture.frame(515, 15, 250, 300, "Process B")
    picture.box(530, 185, 100, 100, "task", "one blocking", "pop", "-for all readers")
    picture.box(660, 60, 90, 56, "store", "mailbox", "`…B!x")
    picture.box(660, 140, 90, 56, "store", "mailbox", "`…B!y")
    picture.box(530, 60, 100, 56, "task", "`receive", "-of channel x")
    picture.say(708, 240, "-a slow reader")
    picture.say(708, 256, "-fills its own")
    picture.say(708, 272, "-mailbox only")
    picture.arrow("1", (100, 116), (100, 170))
    picture.arrow("2", (170, 203), (218, 203), (218, 98), (265, 98), badge=(218, 150))
    picture.arrow("3", (350, 136), (350, 185))
    picture.arrow("4", (435, 235), (530, 235))
    picture.arrow("5", (630, 215), (645, 215), (645, 168), (660, 168), badge=(645, 192))
    picture.arrow("", (645, 168), (645, 100), (660, 100))
    picture.arrow("6", (660, 76), (630, 76), badge=(645, 58))
    picture.write("queue")


def draw_pubsub() -> None:
    """Through a Redis channel."""
    picture = Picture("How a message travels in the pub/sub layer", 300)
    picture.frame(15, 15, 170, 270, "Process A")
    picture.box(30, 60, 140, 56, "task", "`await send(…)", "-never ChannelFull")
    picture.box(30, 170, 140, 66, "task", "one connection", "-for commands", "-and for pushes")
    picture.frame(250, 15, 190, 270, "Redis")
    picture.box(265, 100, 160, 76, "task", "Redis channel", "-keeps nothing; nobody", "-subscribed: it is gone")
    picture.frame(505, 15, 260, 125, "Process B")
    picture.box(520, 55, 100, 66, "store", "mailbox", "-full: dropped,", "-counted")
    picture.box(655, 60, 95, 56, "task", "`receive")
    picture.frame(505, 160, 260, 125, "Process C")
    picture.box(520, 200, 100, 66, "store", "mailbox", "-a copy of", "-its own")
    picture.box(655, 205, 95, 56, "task", "`receive")
    picture.arrow("1", (100, 116), (100, 170))
    picture.arrow("2", (170, 203), (218, 203), (218, 138), (265, 138), badge=(218, 170))
    picture.arrow("3", (425, 125), (473, 125), (473, 88), (520, 88), badge=(473, 107))
    picture.arrow("3", (425, 150), (473, 150), (473, 233), (520, 233), badge=(473, 195))
    picture.arrow("4", (620, 88), (655, 88), badge=(637, 70))
    picture.arrow("4", (620, 233), (655, 233), badge=(637, 215))
    picture.write("pubsub")


def draw_group() -> None:
    """A broadcast, in each layer."""
    picture = Picture("How a broadcast travels in each layer", 560)
    # In memory
    picture.frame(15, 15, 750, 150, "In memory: one encoding, shared")
    picture.box(35, 70, 150, 56, "task", "`group_send(…)", "-encodes once")
    picture.box(265, 62, 150, 72, "store", "the bytes", "-one copy, however", "-many members")
    for number, y in enumerate((40, 82, 124)):
        picture.box(540, y, 205, 32, "store", f"mailbox of member {number + 1}")
        picture.arrow("2" if number == 1 else "", (415, 98), (478, 98), (478, y + 16), (540, y + 16), badge=(478, 98))
    picture.arrow("1", (185, 98), (265, 98))
    # Queue
    picture.frame(15, 180, 750, 180, "Queue: two scripts, one entry for each process")
    picture.box(35, 240, 150, 56, "task", "`group_send(…)")
    picture.box(265, 215, 190, 56, "store", "`asgi:group:room", "-members, by time joined")
    picture.box(265, 290, 190, 56, "store", "`asgispecific.B!", "-one entry, three names")
    picture.box(540, 240, 100, 56, "task", "process B", "-takes it apart")
    for y in (212, 252, 292):
        picture.box(685, y, 65, 32, "store", "mailbox")
        picture.arrow("", (640, 268), (662, 268), (662, y + 16), (685, y + 16))
    picture.arrow("1", (185, 255), (225, 255), (225, 243), (265, 243), badge=(225, 249))
    picture.arrow("2", (185, 281), (225, 281), (225, 318), (265, 318), badge=(225, 300))
    picture.arrow("3", (455, 318), (498, 318), (498, 268), (540, 268), badge=(498, 293))
    # Pub/sub
    picture.frame(15, 375, 750, 170, "Pub/sub: one PUBLISH; each process knows its own members")
    picture.box(35, 432, 150, 56, "task", "`group_send(…)")
    picture.box(265, 432, 190, 56, "task", "`asgi__group__room", "-a Redis channel")
    for y, who in ((410, "B"), (476, "C")):
        picture.box(540, y, 100, 50, "task", f"process {who}")
        picture.box(685, y - 2, 65, 25, "store", "mailbox")
        picture.box(685, y + 28, 65, 25, "store", "mailbox")
        picture.arrow("", (640, y + 25), (662, y + 25), (662, y + 10), (685, y + 10))
        picture.arrow("", (640, y + 25), (662, y + 25), (662, y + 41), (685, y + 41))
        picture.arrow("2", (455, 460), (498, 460), (498, y + 25), (540, y + 25), badge=(498, 460))
    picture.arrow("1", (185, 460), (265, 460))
    picture.write("group")


if __name__ == "__main__":
    draw_memory()
    draw_queue()
    draw_pubsub()
    draw_group()
