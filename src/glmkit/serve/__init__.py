"""The HTTP API: OpenAI's shapes, the official repositories' routes, and what protects them."""
