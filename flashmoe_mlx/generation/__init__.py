"""Messages to tokens to text, on the one thread that runs a model."""
