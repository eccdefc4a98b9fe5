"""Turn messages into tokens, and tokens into text, thoughts and tool calls."""
