"""The reader, and a file of random bytes for it to read."""
