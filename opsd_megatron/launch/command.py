"""The command line of a recipe: flags from its fields, errors in one line, exit code 2 where the user can mend it."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import tyro

from opsd_megatron.config import RunConfig
from opsd_megatron.errors import UserError


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
    """Runs it; a UserError becomes one message from the first rank and exit code 2."""
    try:
        action()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _train(config: RunConfig) -> None:
    from opsd_megatron.train.loop import fit  # imports Megatron, which --help need not wait for

    fit(config)
