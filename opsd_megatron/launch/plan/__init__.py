"""What a recipe needs on a machine, by arithmetic: memory of one rank, FLOPs, bytes on every axis, time, what fits.

`python -m opsd_megatron.launch.plan --help`. `memory.py` is the model of memory: every byte of it belongs to a named
tensor or buffer. `tools/bench/memory.py` compares it with torch's allocator; docs/recipes.md has the table.
"""
