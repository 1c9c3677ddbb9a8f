"""Move a model between Hugging Face layout and Megatron's distributed checkpoints, and check what was moved.

    python tools/convert.py import  --model Qwen/ --output runs/imported
    python tools/convert.py export  --checkpoint runs/opsdl --model Qwen/ --output out/hf --release
    python tools/convert.py verify  --checkpoint runs/opsdl --model out/hf
    python tools/convert.py inspect --checkpoint runs/opsdl

One CPU process, whatever tensor, pipeline, data and context parallel layout a checkpoint was saved under: no GPU, no
torchrun, no Transformer Engine, and the model is never in memory. Outputs appear whole or not at all; an export that
was interrupted goes on where it stopped when the same command is given again.
"""

import os
import sys
import warnings
from typing import Annotated

import tyro
from rich.console import Console

from opsd_megatron.errors import UserError
from opsd_megatron.launch.convert import Export, Import, Inspect, Verify

Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main() -> None:
    warnings.filterwarnings("ignore", module="megatron")  # about packages that a conversion does not need
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: everything happens in host memory
    try:
        command = tyro.cli(Command, description=__doc__)  # type: ignore[arg-type]
        raise SystemExit(command.run(Console(stderr=True)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
