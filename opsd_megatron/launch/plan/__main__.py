"""The planner's command line; `--help` explains."""

import argparse
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.command import exit_with
from opsd_megatron.launch.plan.machine import MACHINES

DESCRIPTION = f"""Memory, FLOPs, traffic and time of a recipe on a machine; exit status 1 where it does not fit.

  python -m opsd_megatron.launch.plan --recipe examples/opsdl_recipes.py:qwen3-32b-128k
  python -m opsd_megatron.launch.plan --machine h200-141gb --machine.nodes 2 --model.path Qwen3-32B --parallel.tp 8

--recipe FILE:NAME starts from an entry of the RECIPES of a Python file, --machine {{{", ".join(MACHINES)}}} from known
devices (the recipe's number of nodes stays); every other flag changes one field."""


def main() -> None:
    from opsd_megatron.launch.plan.request import Request, answer  # Megatron warns when imported; `exit_with` knows it

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    parser.add_argument("--machine", choices=list(MACHINES))
    known, rest = parser.parse_known_args()
    request = _recipe(known.recipe) if known.recipe else Request()
    if known.machine:
        request = replace(request, machine=replace(MACHINES[known.machine], nodes=request.machine.nodes))
    asked = tyro.conf.AvoidSubcommands[Request]
    request = tyro.cli(asked, args=rest, default=request, description=DESCRIPTION)
    if not answer(request, known.recipe or str(request.run.model.path), Console()).fits:
        sys.exit(1)


def _recipe(place: str) -> Any:
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError(f"--recipe {place}: expected FILE:NAME, a Python file and a key of its RECIPES")
    recipes = runpy.run_path(file).get("RECIPES", {})
    if name not in recipes:
        raise ConfigError(f"--recipe {place}: {file} has {', '.join(recipes)}")
    return recipes[name]


if __name__ == "__main__":
    exit_with(main)
