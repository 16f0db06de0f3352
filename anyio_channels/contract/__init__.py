"""What every channel layer promises: names, options, messages, and the layer itself. No I/O, no waiting."""
