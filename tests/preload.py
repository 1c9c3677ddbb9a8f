"""What the fork server imports once for all ranks of the tests; nothing here may start a thread."""

import gc
import warnings

import pytest  # noqa: F401
import transformers  # noqa: F401

import opsd_megatron.launch.command

opsd_megatron.launch.command.quiet_known_warnings()
with warnings.catch_warnings(action="ignore"):
    import opsd_megatron.train.loop

gc.collect()
gc.freeze()  # forks do not search these modules for garbage: a collection took 0.3 s
