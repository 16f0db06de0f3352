"""The demo of ``anyio-channels demo``: a chat over any channel layer; needs ``anyio_channels[demo]``.

Rules:
- nothing else in the package imports it, nor what it needs beyond the package: Starlette and anycorn.
- ``app`` is the chat, ``server`` runs it; the command is in ``anyio_channels.cli``.
"""
