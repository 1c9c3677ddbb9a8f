"""tools/convert.py as a user calls it, and exports that are killed."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from opsd_megatron.checkpoint.export import INTERPRETER_BYTES
from opsd_megatron.checkpoint.manifest import MANIFEST, manifest_problems, read_manifest
from opsd_megatron.errors import CheckpointError, ConfigError
from opsd_megatron.launch.convert import Export, Import, Inspect, Verify
from opsd_megatron.launch.convert_steps import bytes_of
from tests.checkpoint.conversion import export_model, import_model
from tests.ranks import forked
from tests.tiny_models import write_tiny_model

SCRIPT = Path(__file__).parents[2] / "tools/convert.py"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model") / "base", "qwen3", tie_word_embeddings=True)
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return directory


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert Import(model, output, tp=2).run(QUIET) == 0
    return output


@pytest.fixture
def release(run, tmp_path) -> Path:
    facts = {"method": "OPSDL", "data": "Python's language reference", "base": "tiny"}
    assert Export(run, tmp_path / "release", release=True, max_shard_size="100KB", **facts).run(QUIET) == 0
    return tmp_path / "release"


def command(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


def test_the_command_line_explains_itself_and_fails_on_one_line(tmp_path):
    shown = command("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("import", "export", "verify", "inspect", "goes on where it stopped"))
    failed = command("export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "hf"))
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith(f"error: --checkpoint {tmp_path} has no complete")
    assert "Traceback" not in failed.stderr


def test_a_release_is_verified_described_and_listed(release, run, model, capsys):
    manifest = read_manifest(release)
    assert manifest["verification"]["weights"] == "equal bit for bit"
    assert all(check["worst"] <= check["tolerance"] for check in manifest["verification"]["logits"])
    assert manifest["method"] == "OPSDL" and manifest["step"] == 0 and manifest["source"].endswith("step_000000")
    listed = {record["file"] for record in manifest["files"]}
    assert {"README.md", "config.json", "tokenizer.json", "chat_template.jinja"} < listed
    assert len([name for name in listed if name.endswith(".safetensors")]) > 2
    card = (release / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and 'base_model: "tiny"' in card and "Logits, short" in card
    assert Verify(release, run).run(QUIET) == 0
    assert "weights: equal bit for bit" in capsys.readouterr().out


def test_what_is_wrong_with_a_release_is_found_by_verify(release, run, capsys):
    shard = sorted(release.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert Verify(release, run).run(QUIET) == 1
    out = capsys.readouterr().out
    assert f"{shard.name} differs from what was written" in out and "differs from row" in out


def test_an_export_in_another_dtype_says_so_and_is_verified_as_that(run, tmp_path):
    assert Export(run, tmp_path / "half", release=True, dtype="bfloat16").run(QUIET) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    assert "after conversion" in read_manifest(tmp_path / "half")["verification"]["weights"]


def test_logits_that_disagree_prevent_a_release(run, model, tmp_path, monkeypatch):
    from opsd_megatron.checkpoint import verify

    monkeypatch.setattr(verify, "LOGIT_TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match="not released: logits short"):
        Export(run, tmp_path / "release", release=True).run(QUIET)
    assert not (tmp_path / "release").exists()


def test_inspect_lists_and_fails_on_what_is_missing(run, model, tmp_path, capsys):
    assert Inspect(checkpoint=run, tensors=True).run(QUIET) == 0
    out = capsys.readouterr().out
    assert "qwen3, 4 layers" in out and "model.layers.3.self_attn.q_norm.weight  [24]  float32" in out
    assert Inspect(model=model).run(QUIET) == 0
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5, "layer_types": None}))
    assert Inspect(model=broken).run(QUIET) == 1
    assert "model.layers.4.mlp.down_proj.weight is missing" in capsys.readouterr().out


def test_a_dry_run_prints_the_files_and_writes_none(run, tmp_path, capsys):
    assert Export(run, tmp_path / "out", max_shard_size="100KB", dry_run=True).run(QUIET) == 0
    out = capsys.readouterr().out
    assert "model-00001-of-0000" in out and "peak memory at most" in out
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_refused_by_arithmetic(run, model, tmp_path):
    with pytest.raises(CheckpointError, match="--memory-limit 400 MB is below"):
        Export(run, tmp_path / "out", memory_limit="400MB").run(QUIET)
    with pytest.raises(CheckpointError, match="--memory-limit 500 MB is below"):
        Import(model, tmp_path / "out", memory_limit=str(INTERPRETER_BYTES)).run(QUIET)
    with pytest.raises(ConfigError, match="'5 potatoes' is not a size"):
        bytes_of("5 potatoes")
    assert [bytes_of(text) for text in ("5GB", "1.5MB", "2GiB", "77")] == [5 * 10**9, 1_500_000, 2**31, 77]
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(run, model, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").write_text("")
    with pytest.raises(CheckpointError, match="is not empty"):
        Export(run, tmp_path / "hf").run(QUIET)
    with pytest.raises(CheckpointError, match="step_000000 exists"):
        Import(model, run).run(QUIET)
    with pytest.raises(ConfigError, match="--push-to-hub needs --release"):
        Export(run, tmp_path / "out", push_to_hub="me/model").run(QUIET)


def test_an_export_killed_at_any_moment_is_taken_up_and_ends_with_the_same_files(tmp_path):
    model = write_tiny_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512, vocab_size=4000)
    checkpoint = import_model(model, tmp_path / "run")
    arguments = {"max_shard_bytes": 500_000}
    begun = time.monotonic()
    whole = export_model(checkpoint, tmp_path / "whole", model, **arguments)
    duration = time.monotonic() - begun
    draw, killed = random.Random(0), 0
    for _ in range(10):
        process = forked(export_into, checkpoint, tmp_path / "out", model, arguments)
        process.join(draw.uniform(0.2, 1.0) * duration)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        if (tmp_path / "out").exists():  # then it is whole
            assert manifest_problems(tmp_path / "out") == []
            shutil.rmtree(tmp_path / "out")
    assert killed >= 5
    export_model(checkpoint, tmp_path / "out", model, **arguments)
    files = [read_manifest(directory)["files"] for directory in (whole, tmp_path / "out")]
    assert files[0] == files[1] and manifest_problems(tmp_path / "out") == []
    assert not list(tmp_path.glob(".out*"))


def export_into(checkpoint, output, model, arguments) -> None:
    export_model(checkpoint, output, model, **arguments)


def test_the_marker_of_a_finished_directory_is_written_last(run, tmp_path):
    output = tmp_path / "hf"
    Export(run, output).run(QUIET)
    written = max(output.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written.name == MANIFEST
