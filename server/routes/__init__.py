"""Routes that do not generate; the same routers serve on both servers."""

_OWN_PATHS = ("/v1/steering/", "/v1/presets", "/v1/experiments", "/v1/units/", "/v1/atoms", "/v1/models", "/v1/admin/")


def is_own_path(path: str) -> bool:
    """Whether `path` belongs to a router of this package, and so never generates."""
    return path.startswith(_OWN_PATHS)
