"""The pure core: what happens goes in, what to do comes out. Nothing here does I/O, reads a clock, or draws a number."""
