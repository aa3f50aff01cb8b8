"""Serving: steering, the routes that both servers share, and the embedded server."""
