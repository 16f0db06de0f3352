"""Whether Redis is as the layers need it, and what it holds: seen from outside, over connections of its own.

From the bottom: ``seen`` and ``findings`` are data, ``asking`` talks to one server. A ``survey`` says what the servers hold; a
``checkup`` says what is wrong with them: by their ``figures``, by ``trials`` of every command, by the ``prefixes`` in use.
"""
