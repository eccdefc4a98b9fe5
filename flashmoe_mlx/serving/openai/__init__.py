"""OpenAI's API: what a request may say and how an answer looks."""
