"""The embedded inference server: its own process, reached over HTTP only, in a subset of vLLM's dialect.

    python -m opsd_megatron.server --help

Read in this order: `engine` (what an engine is), `exact` and `fast` (the two), `weights` (staged, then swapped whole),
`service` (requests, pauses and versions), `routes` and `control_routes` (HTTP), `process` and `__main__`.
"""
