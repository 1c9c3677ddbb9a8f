"""The commands of tools/convert.py: what each is given, what it prints, and the exit code it ends with.

Heavy imports wait until a command runs, so that --help is there at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from opsd_megatron.errors import CheckpointError, ConfigError
from opsd_megatron.launch.convert_steps import (
    bytes_of,
    compare_logits,
    compare_weights,
    describe,
    local_directory,
    progress,
    push,
    show_model,
    show_shards,
    torch_dtype,
    verify_both,
)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Import:
    """Hugging Face directory -> distributed checkpoint with weights alone."""

    model: Path
    """Hugging Face directory with config.json and safetensors; a hub id (org/name) is fetched where the network
    allows it."""
    output: Path
    """Directory in which step_000000 is written."""
    dtype: Dtype | None = None
    """Dtype to store; that of the embedding in the files where not given."""
    tp: int = 1
    """Tensor-parallel size of the run to come: the vocabulary is padded and tensors are cut for it. Any other layout
    can load the checkpoint too."""
    pp: int = 1
    """Pipeline stages of the run to come: checked, nothing in the files depends on it."""
    vpp: int | None = None
    """Model chunks per stage: checked."""
    writers: int = 2
    """Files written at once."""
    memory_limit: str | None = None
    """Refuse to start where more would be needed, like 2GB."""

    def run(self, console: Console) -> int:
        from opsd_megatron.checkpoint.dist_import import ImportJob, import_checkpoint, import_memory
        from opsd_megatron.checkpoint.export import INTERPRETER_BYTES, refuse_beyond
        from opsd_megatron.checkpoint.state_files import newest_checkpoint
        from opsd_megatron.checkpoint.stored_model import HfModel, specs_of
        from opsd_megatron.config import ParallelConfig
        from opsd_megatron.models.architecture import read_architecture

        if (existing := newest_checkpoint(self.output)) is not None:
            raise CheckpointError(f"{existing} exists; give another --output")
        directory = local_directory(self.model)
        model = HfModel(directory, read_architecture(directory))
        layout = ParallelConfig(tp=self.tp, pp=self.pp, vpp=self.vpp)
        job = ImportJob(directory, self.output, torch_dtype(self.dtype), layout, self.writers)
        needed = import_memory(model, job, INTERPRETER_BYTES)
        refuse_beyond(bytes_of(self.memory_limit), needed, "give fewer --writers or a larger --tp")
        total = sum(spec.num_bytes for spec in specs_of(model))
        with progress(console, f"writing {self.output}", total) as advance:
            path = import_checkpoint(model, job, advance)
        print(f"{directory} -> {path}")
        return 0


@dataclass(frozen=True)
class Export:
    """Distributed checkpoint -> Hugging Face directory."""

    checkpoint: Path
    """Run directory (its newest complete checkpoint is taken) or one checkpoint directory; of plain Megatron too."""
    output: Path
    """Directory to write."""
    model: Path | None = None
    """Hugging Face directory that the run started from: tokenizer, generation config and chat template are copied from
    it, and for a checkpoint of plain Megatron config.json is read there. An imported checkpoint remembers its own."""
    dtype: Dtype | None = None
    """Dtype of all tensors, norms included; as stored where not given."""
    max_shard_size: str = "5GB"
    """Largest file of tensors, like 5GB or 500MB."""
    overwrite: bool = False
    """Replace an output directory that is not empty."""
    release: bool = False
    """Finish only if weights are equal bit for bit and logits agree with transformers; the figures go into the manifest
    and the model card."""
    writers: int = 2
    """Files written at once."""
    memory_limit: str | None = None
    """Refuse to start where more would be needed, like 2GB."""
    dry_run: bool = False
    """Print what would be written, from headers alone, and write nothing."""
    base: str | None = None
    """Name of the base model for the card; the name of --model where not given."""
    method: str | None = None
    """How it was trained, for card and manifest."""
    data: str | None = None
    """What it was trained on, for the card."""
    evaluation: Path | None = None
    """Markdown file with evaluation results for the card."""
    licence: str | None = None
    """Licence for the card; that of the base model's card where not given."""
    push_to_hub: str | None = None
    """Repository (org/name) to upload to after a --release; private unless --public."""
    public: bool = False
    """Make a new repository of --push-to-hub public."""

    def run(self, console: Console) -> int:
        from opsd_megatron.checkpoint.export import (
            ExportJob,
            export_checkpoint,
            export_memory,
            plan_export,
            refuse_beyond,
        )
        from opsd_megatron.checkpoint.model_card import model_card
        from opsd_megatron.checkpoint.sources import check_tokenizer, find_checkpoint
        from opsd_megatron.checkpoint.stored_model import DistModel

        if self.push_to_hub and not self.release:
            raise ConfigError("--push-to-hub needs --release: nothing unverified is uploaded")
        source = find_checkpoint(self.checkpoint, self.model)
        if source.origin is None:
            console.print("no tokenizer is copied: give --model, the directory that the run started from")
        else:
            check_tokenizer(source.origin, source.architecture)
        dtype = torch_dtype(self.dtype)
        model = DistModel(source.path, source.architecture, dtype)
        facts = self._facts(source.origin)
        provenance = {"source": str(source.path), "step": source.step, "method": self.method, "base": facts.base}
        job = ExportJob(
            source.path, self.output, bytes_of(self.max_shard_size) or 0, source.origin, self.overwrite, self.writers,
            provenance,
        )  # fmt: skip
        shards = plan_export(model, job)
        if self.dry_run:
            return show_shards(shards, export_memory(job))
        refuse_beyond(bytes_of(self.memory_limit), export_memory(job), "give fewer --writers")

        def card(verified: Mapping[str, Any]) -> str:
            return model_card(self.output.name, facts, source.step, verified)

        def verified(files: Path) -> dict[str, Any]:
            return verify_both(files, model, dtype, console) if self.release else {}

        with progress(console, f"writing {self.output}", sum(shard.num_bytes for shard in shards)) as advance:
            path = export_checkpoint(model, job, advance, verified, card)
        print(f"{source.path} -> {path}")
        if self.push_to_hub:
            push(path, self.push_to_hub, self.public)
        return 0

    def _facts(self, origin: Path | None):
        from opsd_megatron.checkpoint.model_card import CardFacts, licence_of

        evaluation = self.evaluation.read_text() if self.evaluation else None
        licence = self.licence or (licence_of(origin) if origin else None)
        base = self.base or (origin.name if origin else None)
        return CardFacts(base, self.method, self.data, evaluation, licence)


@dataclass(frozen=True)
class Verify:
    """Is a Hugging Face directory the model of a checkpoint, or what its manifest says? Exit code 1 where it is not."""

    model: Path
    """Hugging Face directory."""
    checkpoint: Path | None = None
    """Run or checkpoint directory, for weights and logits."""
    what: tuple[Literal["weights", "logits", "manifest"], ...] = ()
    """Checks to make; where none is named, all that can be made with what is there."""

    def run(self, console: Console) -> int:
        from opsd_megatron.checkpoint.manifest import MANIFEST, manifest_problems

        has_manifest = (self.model / MANIFEST).is_file()
        what = self.what or (
            *(("weights", "logits") if self.checkpoint else ()),
            *(("manifest",) if has_manifest else ()),
        )
        if not what:
            raise ConfigError(f"nothing to check: give --checkpoint, or a --model with {MANIFEST}")
        if self.checkpoint is None and set(what) != {"manifest"}:
            raise ConfigError("weights and logits are compared with a checkpoint: give --checkpoint")
        problems = []
        if "manifest" in what:
            found = manifest_problems(self.model)
            problems += found
            print(f"manifest: {'every file is as it was written' if not found else f'{len(found)} problems'}")
        if self.checkpoint is not None:
            problems += self._compare(what, console)
        for problem in problems:
            print(f"  {problem}")
        return 1 if problems else 0

    def _compare(self, what: tuple[str, ...], console: Console) -> list[str]:
        from opsd_megatron.checkpoint.sources import find_checkpoint
        from opsd_megatron.checkpoint.stored_model import DistModel, HfModel, refuse_problems
        from opsd_megatron.models.architecture import read_architecture

        assert self.checkpoint is not None
        hf = HfModel(self.model, read_architecture(self.model))
        source = find_checkpoint(self.checkpoint, self.model)
        model = DistModel(source.path, source.architecture)
        refuse_problems(hf, self.model)
        refuse_problems(model, source.path)
        problems = []
        if "weights" in what:
            problems += compare_weights(hf, model, console)
            print(f"weights: {'equal bit for bit' if not problems else f'{len(problems)} tensors differ'}")
        if "logits" in what:
            for check in compare_logits(hf, model, console):
                print(f"logits, {check.what}: {describe(check)}")
                problems += [] if check.passed else [f"logits, {check.what}: {describe(check)}"]
        return problems


@dataclass(frozen=True)
class Inspect:
    """What a model at rest holds, from headers alone. Exit code 1 where something is missing, spare or misshapen."""

    checkpoint: Path | None = None
    """Run or checkpoint directory."""
    model: Path | None = None
    """Hugging Face directory; with --checkpoint, the one whose config.json describes it."""
    tensors: bool = False
    """List every tensor."""

    def run(self, console: Console) -> int:
        from opsd_megatron.checkpoint.sources import find_checkpoint
        from opsd_megatron.checkpoint.stored_model import DistModel, HfModel
        from opsd_megatron.models.architecture import read_architecture

        if self.checkpoint is not None:
            source = find_checkpoint(self.checkpoint, self.model)
            where, model = source.path, DistModel(source.path, source.architecture)
        elif self.model is not None:
            directory = local_directory(self.model)
            where, model = directory, HfModel(directory, read_architecture(directory))
        else:
            raise ConfigError("give --checkpoint or --model")
        problems = model.problems()
        show_model(where, model, self.tensors and not problems)
        for problem in problems:
            print(f"  {problem}")
        print("complete" if not problems else f"{len(problems)} problems")
        return 1 if problems else 0
