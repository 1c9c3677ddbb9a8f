from tests.server.conftest import exact, fast, new_model, old_model, root, server

__all__ = ["exact", "fast", "new_model", "old_model", "root", "server"]
