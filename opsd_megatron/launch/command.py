"""The command line of a recipe: flags from its fields, errors in one line, exit code 2 where the user can mend it."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from opsd_megatron.config import RunConfig
from opsd_megatron.errors import ConfigError, UserError

OTHERS_WAIT_S = 8.0


def run_recipe(recipes: Mapping[str, RunConfig], default: str) -> None:
    """Parses `--recipe NAME` and any field of it, then trains; the `__main__` of an example."""
    chosen = choose("--recipe", list(recipes), default)
    config = parse_fields(recipes[chosen], [f"--recipe {{{', '.join(recipes)}}} picks the starting point."])
    exit_with(lambda: _train(config))


def choose(flag: str, options: list[str], default: str) -> str:
    """The value of one flag that decides on the defaults of all others; the flag is taken out of sys.argv."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, choices=options, default=default)
    known, rest = parser.parse_known_args(sys.argv[1:])
    sys.argv[1:] = rest
    return vars(known)[flag.removeprefix("--").replace("-", "_")]


def parse_fields(config: RunConfig, notes: list[str]) -> RunConfig:
    """`config` with the fields that the command line changes; `--help` explains every field."""
    fields = Annotated[RunConfig, tyro.conf.AvoidSubcommands]
    return tyro.cli(fields, default=config, description="\n".join([str(RunConfig.__doc__), *notes]))


def exit_with(action: Callable[[], object]) -> None:
    """Runs it; a UserError becomes one message and exit code 2.

    Most errors are raised on every rank. Rank 0 speaks first; the others wait, and are ended by torchrun before they
    repeat it, but a rank that is alone with its error is heard.
    """
    quiet_known_warnings()
    try:
        action()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(OTHERS_WAIT_S)
        print(f"error: {error}" if not rank else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def quiet_known_warnings() -> None:
    """Optional packages that are absent, and torch names that Megatron has yet to follow, are nobody's news here."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def take_flag(flag: str) -> bool:
    """Whether the flag was given; it is taken out of sys.argv."""
    given = flag in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != flag]
    return given


def start(config: RunConfig, hf_config: Mapping[str, Any], is_rehearsal: bool) -> None:
    """Rehearses, or trains once the machine is known to be able to hold the model of `hf_config`."""
    if is_rehearsal:
        from opsd_megatron.launch.rehearse import rehearse

        rehearse(config, hf_config, Path("runs/rehearsal"))
        return
    require_devices(config, hf_config)
    _train(config)


def require_devices(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """ConfigError that says what is missing and what would fit, by arithmetic, before anything is loaded."""
    import torch

    from opsd_megatron.launch.plan.estimate import make_plan
    from opsd_megatron.launch.plan.machine import GIB, MACHINES
    from opsd_megatron.launch.plan.search import changes, fitting_layouts
    from opsd_megatron.models.architecture import architecture_of

    model = config.model
    architecture = architecture_of(hf_config, model.yarn_factor, model.yarn_original_positions)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    machine = replace(MACHINES["h100-80gb"], nodes=world_size // devices, devices=devices)
    plan = make_plan(config, architecture, machine)
    needs = f"this recipe needs {world_size} CUDA devices with {plan.fullest.peak.total / GIB:.1f} GiB each"
    if not torch.cuda.is_available():
        raise ConfigError(f"{needs}; this machine has none. Add --rehearse to walk through it on CPU ranks")
    held = torch.cuda.get_device_properties(0).total_memory
    if plan.fullest.peak.total <= held:
        return
    here = replace(machine, memory_gib=held / GIB)
    nearest = [
        " ".join(changes(config, other.config)) for other in fitting_layouts(config, architecture, here, count=3)
    ]
    advice = f"These fit: {'; '.join(nearest)}" if nearest else "No layout fits: take more nodes"
    raise ConfigError(f"{needs}; these have {held / GIB:.0f} GiB. {advice}. Add --plan to see where the memory goes")


def show_plan(config: RunConfig, machine: str, nodes: int, title: str) -> None:
    """Prints the recipe's plan on so many nodes of a known machine."""
    from rich.console import Console

    from opsd_megatron.launch.plan.machine import MACHINES
    from opsd_megatron.launch.plan.request import Request, answer

    answer(Request(config, replace(MACHINES[machine], nodes=nodes)), title, Console())


def _train(config: RunConfig) -> None:
    from opsd_megatron.train.loop import fit  # imports Megatron, which --help need not wait for

    fit(config)
