"""Channel layers on Redis, and the small client below them."""
