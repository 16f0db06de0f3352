"""For authors of layers: what a layer is made of that sends its messages over something else.

Write a ``Transport``, and a ``Hub`` makes a channel layer of it.
"""

from .local.deliveries import Deliveries, group_topic
from .local.hub import Hub
from .local.transport import Transport

__all__ = ["Deliveries", "Hub", "Transport", "group_topic"]
