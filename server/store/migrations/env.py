"""Run by alembic with the connection that `server.store.schema` passes in; it has begun the transaction already."""

from alembic import context

from server.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # the transaction is the caller's: all steps or none, on SQLite too
)
context.run_migrations()
