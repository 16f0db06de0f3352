"""What the layers on Redis are built from. Importing it needs the extra ``anyio_channels[redis]``."""
