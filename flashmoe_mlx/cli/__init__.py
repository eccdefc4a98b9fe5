"""Shared parts of the commands: their table, flags, one-line errors, Ctrl-C, progress bars and the chat loop."""
