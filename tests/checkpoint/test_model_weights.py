"""Hugging Face -> Megatron -> Hugging Face, bit for bit, under every layout; strictness of loading."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsd_megatron.checkpoint.live_export import save_hf
from opsd_megatron.checkpoint.model_weights import export_weights, load_weights, named_parameters
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import build_mesh
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
TWO_RANKS = {
    "tp2": ParallelConfig(tp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "pp2 vpp2": ParallelConfig(pp=2, vpp=2),
    "cp2": ParallelConfig(cp=2),
    "dp2": ParallelConfig(),
}
FOUR_RANKS = {
    "tp2 pp2": ParallelConfig(tp=2, pp=2),
    "tp2 pp2 vpp2 sp": ParallelConfig(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "tp2 dp2": ParallelConfig(tp=2),
    "pp2 cp2": ParallelConfig(pp=2, cp=2),
}
LAYOUTS = [
    ("one rank", 1, ParallelConfig()),
    *((name, 2, layout) for name, layout in TWO_RANKS.items()),
    *((name, 4, layout) for name, layout in FOUR_RANKS.items()),
]


@dataclass(frozen=True)
class Model:
    directory: Path
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[tuple[str, bool], Model]:
    """Every family, untied and tied; two of the directories have several shards."""
    made = {}
    for family in FAMILIES:
        for tied in (False, True):
            directory = tmp_path_factory.mktemp(f"{family}-{tied}")
            write_tiny_model(directory, family, tie_word_embeddings=tied)
            made[family, tied] = Model(directory, load_file(directory / "model.safetensors"))
    return made


def round_trip(directories, layout: ParallelConfig, dtype: torch.dtype):
    """Names and tensors that arrive on this rank, for each directory."""
    mesh = build_mesh(layout)
    arrived = []
    for directory in directories:
        architecture = read_architecture(directory)
        chunks = build_model(architecture, mesh, dtype)
        load_weights(chunks, architecture, directory, mesh)
        arrived.append([(name, tensor) for name, tensor in export_weights(chunks, architecture, mesh)])
    return arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("world", "layout"), [entry[1:] for entry in LAYOUTS], ids=[entry[0] for entry in LAYOUTS])
def test_round_trip_is_bitwise(models, world, layout, dtype):
    results = run_on_ranks(world, round_trip, [model.directory for model in models.values()], layout, dtype)
    for number, (key, model) in enumerate(models.items()):
        arrived = dict(results[0][number])
        assert arrived.keys() == model.tensors.keys(), key
        for name, tensor in model.tensors.items():
            assert torch.equal(arrived[name], tensor.to(dtype)), (key, name)
            assert arrived[name].dtype == dtype
        for other in results[1:]:
            assert [name for name, _ in other[number]] == list(arrived)
            assert all(tensor is None for _, tensor in other[number])


def gradients_by_name(directory, layout: ParallelConfig):
    """Fills `main_grad` with a function of the weight's own values and exports it."""
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.bfloat16)
    load_weights(chunks, architecture, directory, mesh)
    for parameter in named_parameters(chunks).values():
        parameter.main_grad = parameter.detach().float() * 3
    exported = export_weights(chunks, architecture, mesh, value_of=lambda parameter: parameter.main_grad)
    return dict(exported)


def test_another_tensor_of_each_parameter_is_exported_in_its_own_dtype(models):
    model = models["qwen2", True]
    exported = run_on_ranks(4, gradients_by_name, model.directory, ParallelConfig(tp=2, pp=2))[0]
    for name, tensor in model.tensors.items():
        assert torch.equal(exported[name], tensor.bfloat16().float() * 3), name


def last_stage_copy(directory):
    mesh = build_mesh(ParallelConfig(pp=2))
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32)
    load_weights(chunks, architecture, directory, mesh)
    return {name: parameter.detach() for name, parameter in named_parameters(chunks).items() if "layers" not in name}


def test_the_last_stage_gets_a_copy_of_a_tied_embedding(models):
    model = models["qwen3", True]
    first, last = run_on_ranks(2, last_stage_copy, model.directory)
    embedding = model.tensors["model.embed_tokens.weight"]
    assert torch.equal(first["embedding.word_embeddings.weight"], embedding)
    assert torch.equal(last["output_layer.weight"], embedding)


def padded_rows(directory):
    mesh = build_mesh(ParallelConfig(tp=4))
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32)
    load_weights(chunks, architecture, directory, mesh)
    exported = dict(export_weights(chunks, architecture, mesh))
    return named_parameters(chunks)["output_layer.weight"].detach(), exported.get("lm_head.weight")


def test_rows_beyond_the_vocabulary_are_zero_and_never_exported(tmp_path):
    directory = write_tiny_model(tmp_path / "m", "llama", num_key_value_heads=4, vocab_size=249)
    shards = run_on_ranks(4, padded_rows, directory)
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    assert torch.count_nonzero(torch.cat([shard for shard, _ in shards])[249:]) == 0
    assert torch.equal(shards[0][1], head)


def save(directory, out, layout: ParallelConfig, dtype, max_shard_bytes):
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32)
    load_weights(chunks, architecture, directory, mesh)
    save_hf(chunks, architecture, mesh, directory, out, dtype=dtype, max_shard_bytes=max_shard_bytes)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_is_saved_and_computes_the_same(models, tmp_path, tied):
    from transformers import AutoModelForCausalLM

    model = models["qwen3", tied]
    run_on_ranks(2, save, model.directory, tmp_path / "out", ParallelConfig(pp=2), None, 100_000)
    tokens = torch.arange(20)[None]
    saved, original = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tmp_path / "out", model.directory)
    )
    with torch.no_grad():
        assert torch.equal(saved(tokens).logits, original(tokens).logits)


def test_saving_in_another_dtype_says_so_in_the_config(models, tmp_path):
    run_on_ranks(
        2, save, models["llama", False].directory, tmp_path / "out", ParallelConfig(tp=2), torch.bfloat16, 10**9
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in models["llama", False].tensors.items():
        assert torch.equal(saved[name], tensor.bfloat16())


def failure_of_save(directory, out, layout: ParallelConfig):
    try:
        save(directory, out, layout, None, 10**9)
    except CheckpointError as error:
        return str(error)


def test_every_rank_learns_that_the_target_is_not_empty(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    messages = run_on_ranks(2, failure_of_save, models["llama", False].directory, out, ParallelConfig(pp=2))
    assert all("is not empty" in message for message in messages)
    assert (out / "mine.txt").read_text() == "keep me"


def failure_of_load(directory, layout: ParallelConfig) -> str | None:
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32)
    try:
        load_weights(chunks, architecture, directory, mesh)
    except CheckpointError as error:
        return str(error)


def damaged(model: Model, out: Path, change) -> Path:
    """A copy of the model whose tensors `change` has edited."""
    tensors = dict(model.tensors)
    change(tensors)
    out.mkdir()
    (out / "config.json").write_text((model.directory / "config.json").read_text())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(UP), [UP, "is missing"]),
        (lambda tensors: tensors.update(spare=torch.zeros(1)), ["spare", "no place"]),
        (
            lambda tensors: tensors.update({UP: torch.zeros(3, 5)}),
            ["model.safetensors", UP, "[3, 5]", "[96, 64]"],
        ),
        (lambda tensors: tensors.update({UP: torch.zeros(96, 64, dtype=torch.int8)}), [UP, "I8", "dequantise"]),
    ],
    ids=["missing tensor", "extra tensor", "wrong shape", "quantised"],
)
def test_what_does_not_fit_is_named(models, tmp_path, change, words):
    message = failure_of_load(damaged(models["llama", False], tmp_path / "m", change), ParallelConfig())
    assert message and all(word in message for word in words), message


def test_a_head_that_contradicts_the_tie_is_refused(models, tmp_path):
    model = models["llama", True]
    same = damaged(
        model, tmp_path / "same", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    other = damaged(
        model, tmp_path / "other", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    )
    assert failure_of_load(same, ParallelConfig()) is None
    assert "config.json ties them" in str(failure_of_load(other, ParallelConfig()))


def test_every_rank_learns_of_a_cut_file(models, tmp_path):
    directory = damaged(models["llama", False], tmp_path / "m", lambda tensors: None)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    messages = run_on_ranks(2, failure_of_load, directory, ParallelConfig(pp=2))
    assert all(str(file) in message and "cut" in message for message in messages)
