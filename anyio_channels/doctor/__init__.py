"""Whether Redis is as the layers need it, and what it holds: looked at from outside."""
