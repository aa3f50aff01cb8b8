"""Alembic's scripts; `server.store.schema` runs them."""
