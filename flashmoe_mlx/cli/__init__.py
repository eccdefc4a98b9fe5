"""What the commands share: flags, one-line errors, Ctrl-C, progress bars and the chat loop."""
