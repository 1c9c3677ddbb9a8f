"""Several inference servers as one `RolloutBackend`: `servers.ServerPool` is the entrance."""
