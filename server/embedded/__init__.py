"""The embedded server: the OpenAI routes on a transformers engine in this process."""
