"""Directories in Hugging Face layout: shards, errors that name file and tensor, writing whole or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opsd_megatron.checkpoint.hf_files import INDEX_FILE, HfReader
from opsd_megatron.checkpoint.hf_writer import check_target, finish_directory, hf_config_text, write_shard
from opsd_megatron.checkpoint.shard_plan import TensorSpec, plan_shards
from opsd_megatron.errors import CheckpointError

TENSORS = {f"layer.{i}.weight": torch.arange(12.0).reshape(3, 4) + i for i in range(5)}
TENSOR_BYTES = 48


def write(tensors, out, hf_config=None, source_dir=None, max_shard_bytes=10**9):
    """What a live export does, on one rank."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    staging = out.with_name(".staging")
    staging.mkdir()
    shards, coming = plan_shards(specs, max_shard_bytes), iter(tensors)
    records = [write_shard(staging, shard, coming) for shard in shards]
    return finish_directory(staging, out, shards, records, hf_config or {}, source_dir, {})


@pytest.fixture
def sharded(tmp_path):
    return write(TENSORS.items(), tmp_path / "sharded", max_shard_bytes=2 * TENSOR_BYTES)


def test_shards_are_named_and_indexed_as_hugging_face_does(sharded):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 5 * TENSOR_BYTES}
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert torch.equal(shard.get_tensor(name), TENSORS[name])


def test_what_is_written_is_read_back(sharded, tmp_path):
    single = write(TENSORS.items(), tmp_path / "single")
    assert not (single / INDEX_FILE).exists()
    assert (single / "model.safetensors").stat().st_mode == (single / "config.json").stat().st_mode
    for reader in (HfReader(sharded), HfReader(single)):
        assert reader.names == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name), tensor)
            assert torch.equal(reader.read(name, 0, (1, 3)), tensor[1:3])
            assert torch.equal(reader.read(name, 1, (2, 4)), tensor[:, 2:4])
            assert reader.shape(name) == (3, 4)


def test_views_are_written_as_they_were_when_given(tmp_path):
    buffer = torch.empty(3, 4)

    def reused_buffer():
        for name, tensor in TENSORS.items():
            buffer.copy_(tensor)
            yield name, buffer

    reader = HfReader(write(reused_buffer(), tmp_path / "m"))
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-00002-of-00003\.safetensors"):
        HfReader(sharded)


def test_a_cut_shard_is_named(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is cut"):
        HfReader(sharded)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weight_map: weight_map.pop("layer.0.weight"), r"holds layer\.0\.weight that .* does not list"),
        (
            lambda weight_map: weight_map.update(ghost="model-00001-of-00003.safetensors"),
            r"model-00001-of-00003\.safetensors lacks ghost",
        ),
    ],
    ids=["entry missing", "entry without tensor"],
)
def test_an_index_that_contradicts_its_shards_is_refused(sharded, edit, message):
    index = json.loads((sharded / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        HfReader(sharded)


def test_a_broken_index_is_refused(sharded):
    (sharded / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is not an index"):
        HfReader(sharded)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        HfReader(tmp_path)


def test_tokenizer_and_generation_config_come_along_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    kept = ("tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "LICENSE")
    for name in (*kept, "train_log.json", "README.md", "config.json", "pytorch_model.bin"):
        (source / name).write_text(name)
    save_file({"old": torch.zeros(1)}, source / "model.safetensors")
    out = write(TENSORS.items(), tmp_path / "out", {"model_type": "qwen3", "torch_dtype": "bfloat16"}, source)
    assert {path.name for path in out.iterdir()} == {*kept, "config.json", "model.safetensors", "MANIFEST.json"}
    written = json.loads((out / "config.json").read_text())
    assert written == {"model_type": "qwen3", "dtype": "float32", "torch_dtype": "float32"}


def test_a_target_that_is_not_empty_is_replaced_only_when_asked_and_then_whole(tmp_path):
    out = write(TENSORS.items(), tmp_path / "out", max_shard_bytes=TENSOR_BYTES)
    with pytest.raises(CheckpointError, match="is not empty"):
        check_target(out, overwrite=False)
    check_target(out, overwrite=True)
    write(TENSORS.items(), out)
    assert sorted(path.name for path in out.iterdir()) == ["MANIFEST.json", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_tensor_than_planned_is_named(tmp_path):
    shuffled = [("layer.0.weight", TENSORS["layer.0.weight"]), ("layer.2.weight", TENSORS["layer.2.weight"])]
    with pytest.raises(CheckpointError, match=r"layer\.2\.weight of shape .* came where layer\.1\.weight"):
        write(shuffled, tmp_path / "out")


def test_a_tensor_given_twice_is_refused():
    spec = TensorSpec("layer.0.weight", torch.float32, (1,))
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight was given twice"):
        plan_shards([spec, spec], 100)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32
            }
        },
    ],
)  # fmt: skip
def test_rotary_parameters_are_written_in_the_words_of_transformers_5_and_4(given):
    written = json.loads(hf_config_text(given, {torch.bfloat16}))
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e4
    scaling = written["rope_parameters"].copy()
    del scaling["rope_theta"]
    assert written["rope_scaling"] == (None if scaling["rope_type"] == "default" else scaling)
    assert json.loads(hf_config_text(written, {torch.bfloat16})) == written
