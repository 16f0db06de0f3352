"""What one process holds of a channel layer: mailboxes, channels, groups, and how tasks wait at them. No I/O."""
