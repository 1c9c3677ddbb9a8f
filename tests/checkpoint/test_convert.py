"""Conversion without a model: both ways bit for bit, from every layout, and what is refused."""

import json
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsd_megatron.checkpoint import weight_map
from opsd_megatron.checkpoint.dist_import import ImportJob, import_checkpoint
from opsd_megatron.checkpoint.dist_reader import DistReader
from opsd_megatron.checkpoint.sources import check_tokenizer, find_checkpoint
from opsd_megatron.checkpoint.stored_model import DistModel, HfModel
from opsd_megatron.checkpoint.verify import check_logits, weight_problems
from opsd_megatron.checkpoint.weight_map import WeightRow
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError, ConfigError
from opsd_megatron.models.architecture import read_architecture
from tests.checkpoint.conversion import LAYOUTS, export_model, import_model, pass_through_megatron, stacked_copy
from tests.models.batches import layout_name
from tests.ranks import run_on_ranks
from tests.tiny_models import YARN, write_tiny_model

FAMILIES = [(family, tied) for family in ("qwen2", "qwen3", "llama", "mistral") for tied in (False, True)]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[tuple[str, bool, torch.dtype], Path]:
    """Every family, tied and untied, in both dtypes; as many KV heads as the widest layout has tp ranks."""
    made = {}
    for family, tied in FAMILIES:
        root = tmp_path_factory.mktemp(f"{family}-{tied}")
        plain = write_tiny_model(root / "float32", family, tie_word_embeddings=tied, num_key_value_heads=4)
        half = root / "bfloat16"
        shutil.copytree(plain, half)
        stored = {name: tensor.bfloat16() for name, tensor in load_file(plain / "model.safetensors").items()}
        save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
        made |= {(family, tied, torch.float32): plain, (family, tied, torch.bfloat16): half}
    return made


@pytest.fixture(scope="module")
def imported(models, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("imported")
    return {
        key: import_model(model, root / str(number), parallel=ParallelConfig(tp=1 + number % 2))
        for number, (key, model) in enumerate(models.items())
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_hugging_face_to_megatron_and_back_is_bitwise_under_every_layout(models, imported, tmp_path, layout):
    jobs = [(model, imported[key], tmp_path / str(n)) for n, (key, model) in enumerate(models.items())]
    run_on_ranks(layout.model_ranks, pass_through_megatron, jobs, layout)
    for number, model in enumerate(models.values()):
        assert_same(export_model(tmp_path / str(number) / "step_000000", tmp_path / f"hf{number}", model), model)


def test_every_layout_loads_what_every_other_one_saved(models, imported, tmp_path):
    key = ("qwen3", False, torch.bfloat16)
    saved = {layout: tmp_path / layout_name(layout) for layout in LAYOUTS}
    for layout, output in saved.items():
        run_on_ranks(layout.model_ranks, pass_through_megatron, [(models[key], imported[key], output)], layout)
    for layout in LAYOUTS:
        others = [(one, two) for one, two in permutations(LAYOUTS, 2) if two == layout]
        jobs = [
            (models[key], saved[one] / "step_000000", tmp_path / f"{layout_name(one)}-{layout_name(two)}")
            for one, two in others
        ]
        run_on_ranks(layout.model_ranks, pass_through_megatron, jobs, layout)
        for _, _, output in jobs:
            hf = export_model(output / "step_000000", output / "hf", models[key])
            assert_same(hf, models[key])


def test_tensors_stacked_over_layers_under_local_names_are_read_too(models, imported, tmp_path):
    key = ("qwen3", False, torch.float32)
    plain = stacked_copy(imported[key], tmp_path / "iter_0000007")
    assert "decoder.layers.input_layernorm.weight" in DistReader(plain).tensors
    source = find_checkpoint(plain, models[key])
    assert source.step == 7
    assert_same(export_model(source.path, tmp_path / "hf", models[key]), models[key])
    with pytest.raises(CheckpointError, match="give --model, a directory with its config"):
        find_checkpoint(plain, None)


def test_an_import_is_cut_and_padded_for_the_layout_that_was_named(models, tmp_path):
    model = models["qwen2", False, torch.float32]
    path = import_model(model, tmp_path, parallel=ParallelConfig(tp=4), dtype=torch.bfloat16)
    stored = DistReader(path).tensors
    assert stored["embedding.word_embeddings.weight"].shape == (252, 64)
    assert len(stored["embedding.word_embeddings.weight"].chunks) == 4
    assert {chunk.sizes for chunk in stored["decoder.layers.0.mlp.linear_fc2.weight"].chunks} == {(64, 24)}
    assert len(stored["decoder.layers.0.mlp.linear_fc1.weight"].chunks) == 8
    exported = tensors_of(export_model(path, tmp_path / "hf", model))
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("rope", ["plain", "yarn", "llama3"])
def test_logits_of_both_sides_agree_layer_by_layer_also_beyond_the_original_context(tmp_path, rope):
    changes = {"rope_parameters": YARN} if rope == "yarn" else {}
    model = write_tiny_model(tmp_path / "model", "llama" if rope == "llama3" else "qwen3", **changes)
    hf = HfModel(model, read_architecture(model))
    stored = DistModel(import_model(model, tmp_path / "run"), hf.architecture)
    checks = check_logits(hf, stored)
    assert len(checks) == 2 and checks[1].positions[1] > (32 if rope != "plain" else 400)
    for check in checks:
        assert check.worst <= 5e-6 and check.passed and 1 < check.largest < 5
    assert weight_problems(hf, stored) == []


def test_a_rotary_setting_that_no_weight_shows_is_found_by_the_logits(tmp_path):
    model = write_tiny_model(tmp_path / "model", "llama")
    right = read_architecture(model)
    wrong = replace(right, rope=replace(right.rope, original_max_positions=8192))
    hf, stored = HfModel(model, right), DistModel(import_model(model, tmp_path / "run"), wrong)
    assert weight_problems(hf, stored) == []
    checks = check_logits(hf, stored)
    assert not any(check.passed for check in checks) and checks[0].worst > 0.1


def test_what_transformers_reads_back_computes_the_same(models, imported, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    key = ("qwen2", True, torch.float32)
    export_model(imported[key], tmp_path / "hf", models[key], max_shard_bytes=60_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    tokens = torch.arange(40)[None]
    with torch.no_grad(), caplog.at_level("WARNING"):
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
            for path in (tmp_path / "hf", models[key])
        )
    assert torch.equal(ours, theirs)
    assert not [record for record in caplog.records if "weights" in record.getMessage().lower()]


def damaged(checkpoint: Path, output: Path) -> tuple[Path, Path]:
    """A copy, and its largest file."""
    shutil.copytree(checkpoint, output)
    return output, max(output.glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_damage_to_a_checkpoint_is_named(models, imported, tmp_path):
    key = ("mistral", False, torch.bfloat16)
    architecture = read_architecture(models[key])
    cut, file = damaged(imported[key], tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name} is cut"):
        DistModel(cut, architecture)
    gone, file = damaged(imported[key], tmp_path / "gone")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        DistModel(gone, architecture)
    unfinished, _ = damaged(imported[key], tmp_path / "unfinished")
    (unfinished / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no metadata\.json, which Megatron writes last"):
        DistModel(unfinished, architecture)
    flipped, _ = damaged(imported[key], tmp_path / "flipped")
    reader = DistReader(flipped)
    chunk = reader.tensors["decoder.layers.2.mlp.linear_fc2.weight"].chunks[0]
    at = reader._data_start(chunk, torch.bfloat16) + 4
    whole = bytearray((flipped / chunk.file).read_bytes())
    whole[at] ^= 1
    (flipped / chunk.file).write_bytes(bytes(whole))
    found = weight_problems(HfModel(models[key], architecture), DistModel(flipped, architecture))
    assert found == ["model.layers.2.mlp.down_proj.weight differs from row 0 on"]


def test_a_pickle_that_is_no_checkpoint_metadata_is_not_run(imported, tmp_path):
    import pickle

    copy, _ = damaged(next(iter(imported.values())), tmp_path / "copy")
    (copy / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"asks for builtins\.print"):
        DistReader(copy)


def test_missing_spare_and_misshapen_tensors_are_all_named(models, imported, tmp_path):
    key = ("llama", False, torch.float32)
    architecture = read_architecture(models[key])
    taller = replace(architecture, num_layers=5, ffn_size=95)
    problems = "\n".join(DistModel(imported[key], taller).problems())
    assert "decoder.layers.4.mlp.linear_fc1.weight is missing" in problems
    assert "decoder.layers.0.mlp.linear_fc2.weight has shape [64, 96], the model asks for [64, 95]" in problems
    tied = DistModel(imported[key], replace(architecture, tied=True)).problems()
    assert tied == ["output_layer.weight has no row in the llama weight table"]
    broken = tmp_path / "broken"
    shutil.copytree(models[key], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, broken / "model.safetensors")
    problems = HfModel(broken, architecture).problems()
    assert "model.layers.0.mlp.gate_proj.weight is missing" in problems
    assert "model.layers.0.mlp.gate.weight has no place in the model of config.json" in problems
    assert any("tensor model.norm.weight has dtype I8" in problem for problem in problems)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is missing"):
        import_checkpoint(HfModel(broken, architecture), ImportJob(broken, tmp_path / "out"))


def test_a_layout_that_does_not_divide_the_model_is_refused_before_anything_is_written(models, tmp_path):
    model = models["qwen3", False, torch.float32]
    with pytest.raises(ConfigError, match=r"parallel\.tp=8 does not divide the model's 4"):
        import_model(model, tmp_path / "out", parallel=ParallelConfig(tp=8))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(models, tmp_path):
    architecture = read_architecture(models["qwen3", False, torch.float32])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 250}}, "added_tokens": []}))
    with pytest.raises(CheckpointError, match="token ids up to 250, the embedding 250 rows"):
        check_tokenizer(tmp_path, architecture)


def test_a_family_is_a_table(models, tmp_path, monkeypatch):
    """Llama's layers under other names, as a family that nobody has heard of."""

    def renamed(row: WeightRow) -> WeightRow:
        parts = [replace(part, name=part.name.replace("model.layers.", "trunk.blocks.")) for part in row.parts]
        return replace(row, parts=tuple(parts))

    monkeypatch.setitem(weight_map.FAMILIES, "mistral", tuple(renamed(row) for row in weight_map.FAMILIES["llama"]))
    model = tmp_path / "model"
    shutil.copytree(models["mistral", False, torch.float32], model)
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.replace("model.layers.", "trunk.blocks."): tensor for name, tensor in tensors.items()},
        model / "model.safetensors",
    )
    assert_same(export_model(import_model(model, tmp_path / "run"), tmp_path / "hf", model), model)
