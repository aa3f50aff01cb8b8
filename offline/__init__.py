"""Discovery: reads a model, an adapter and documents; writes a package. Never imports the server."""
