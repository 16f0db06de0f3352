"""For authors of layers: what a layer is made of that sends its messages over something else.

Write a ``Transport``, and a ``Hub`` makes a channel layer of it.
"""

from .local.hub import Hub, Transport, group_topic

__all__ = ["Hub", "Transport", "group_topic"]
