"""Responses from an inference server that runs in another process, maybe on another machine.

`backend` is the Protocol, `embedded` speaks it with `opsd_megatron.server`, `sampler` turns prompts into rollouts,
`process` starts a server beside a run.
"""
