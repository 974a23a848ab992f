"""A model behind HTTP: OpenAI's endpoints, and a page that shows what the model thinks."""
