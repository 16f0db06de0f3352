"""A WSGI application under an ASGI server, and an ASGI application under a WSGI server."""

from .to_asgi import WsgiToAsgi
from .to_wsgi import AsgiToWsgi

__all__ = ["AsgiToWsgi", "WsgiToAsgi"]
