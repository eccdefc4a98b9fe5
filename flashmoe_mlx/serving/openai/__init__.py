"""OpenAI's API: the schema of its requests and the shape of its replies."""
