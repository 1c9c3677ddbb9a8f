"""Responses from an inference server that runs in another process, maybe on another machine.

`backend` is the Protocol; `connect` finds out which server answers and returns its client: `vllm`, `sglang` or
`embedded` (for `opsd_megatron.server`), over `client` and `http`. `replies` checks what comes back, `probe` what a
server can do. `sampler` turns prompts into rollouts, `process` starts a server beside a run.
"""
