"""tools/convert.py: both directions bit for bit, a trained checkpoint out, errors on one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd_megatron.checkpoint.training_state import save_state
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError
from tests.checkpoint.training import start
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tools.convert import Export, Import, export_model, import_model

SCRIPT = Path(__file__).parents[2] / "tools/convert.py"


def import_and_export(model, work, **changes):
    import_model(Import(model, work / "dist"))
    export_model(Export(work / "dist", work / "hf", **changes))


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False), ("mistral", True)])
def test_import_then_export_is_bitwise(tmp_path, family, tied):
    model = write_tiny_model(tmp_path / "model", family, tie_word_embeddings=tied)
    (model / "tokenizer.json").write_text("{}")
    run_on_ranks(1, import_and_export, model, tmp_path)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "hf/tokenizer.json").exists()  # from the directory that the import remembers


def train_and_save(model, out):
    training = start(model, ParallelConfig(tp=2, pp=2), distributed=True, dtype=torch.bfloat16)
    training.step()
    save_state(out, 1, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer)
    return training.weights()


def export_only(arguments):
    export_model(arguments)


def test_a_run_under_another_layout_is_exported(tmp_path):
    model = write_tiny_model(tmp_path / "model", "qwen2", vocab_size=249)
    trained = run_on_ranks(4, train_and_save, model, tmp_path / "run")[0]
    run_on_ranks(1, export_only, Export(tmp_path / "run", tmp_path / "hf", model, "float32"))
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in trained.items())


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").write_text("")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_model(Export(tmp_path / "run", tmp_path / "hf"))


def import_twice(model, out):
    import_model(Import(model, out))
    with pytest.raises(CheckpointError, match="step_000000 exists"):
        import_model(Import(model, out))


def test_an_import_never_replaces_a_checkpoint(tmp_path):
    run_on_ranks(1, import_twice, write_tiny_model(tmp_path / "model", "llama"), tmp_path / "out")


def test_the_command_line_explains_itself_and_fails_on_one_line(tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)

    shown = command("--help")
    assert shown.returncode == 0 and "import" in shown.stdout and "export" in shown.stdout
    failed = command("export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf"))
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith(f"error: --checkpoint {tmp_path} has no complete")
    assert "Traceback" not in failed.stderr
