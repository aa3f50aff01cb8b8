"""Routes that do not generate; the same routers serve on both servers."""
