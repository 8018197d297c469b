"""Messages to bytes and back, and how large anything from outside may be."""
