import json
from dataclasses import replace

import pytest

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError, ConfigError
from opsd_megatron.models.architecture import (
    FAMILIES,
    RopeConfig,
    architecture_of,
    check_layout,
    padded_vocab,
    read_architecture,
)
from tests.tiny_models import LLAMA3, YARN, tiny_config

QWEN2_5_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def config_of(family: str, **changes) -> dict:
    return {**tiny_config(family).to_dict(), **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_back(family, tmp_path):
    tiny_config(family, tie_word_embeddings=True).save_pretrained(tmp_path)
    found = read_architecture(tmp_path)
    assert (found.family, found.num_layers, found.hidden_size, found.ffn_size) == (family, 4, 64, 96)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 24 if family == "qwen3" else 16)
    assert (found.vocab_size, found.tied, found.norm_eps, found.max_positions) == (250, True, 1e-6, 512)
    assert (found.qkv_bias, found.qk_norm) == (family == "qwen2", family == "qwen3")
    assert found.rope.kind == ("llama3" if family == "llama" else "default")
    assert found.hf_config == json.loads((tmp_path / "config.json").read_text())


def test_a_config_from_the_hub_in_the_spelling_of_transformers_4_is_read():
    found = architecture_of(QWEN2_5_32B)
    assert (found.heads, found.kv_heads, found.head_dim, found.tied) == (40, 8, 128, False)
    assert found.rope == RopeConfig(theta=1e6)


def test_both_spellings_of_rotary_parameters_mean_the_same():
    new = architecture_of(config_of("llama", rope_parameters=LLAMA3)).rope
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = config_of("llama", rope_theta=LLAMA3["rope_theta"], rope_scaling=scaling)
    del old["rope_parameters"]
    assert architecture_of(old).rope == new
    old["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert architecture_of(old).rope == new
    assert (new.factor, new.low_freq_factor, new.high_freq_factor, new.original_max_positions) == (8, 1, 4, 32)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_a_yarn_factor_stretches_the_model_and_its_exported_config(spelling):
    config = QWEN2_5_32B if spelling == "rope_scaling" else config_of("qwen3")
    found = architecture_of(config, yarn_factor=4.0)
    assert found.rope.kind == "yarn" and found.rope.factor == 4.0
    assert found.rope.original_max_positions == config["max_position_embeddings"]
    assert architecture_of(found.hf_config) == found  # servers of the exported weights compute the same
    assert "yarn" not in json.dumps(config)


REFUSED = [
    ({"model_type": "gemma3"}, "model_type='gemma3' is not one of qwen2, qwen3, llama, mistral"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_parameters": {**YARN, "finetuned": True}}, "rope_type=yarn with finetuned is not understood"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "needs high_freq_factor, low"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta missing"),
    ({"rope_theta": 5e5}, "rope_theta=500000.0 contradicts"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"attention_bias": True}, "attention_bias=True is not supported; expected false: a bias on the output projection"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected silu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_experts": 8}, "num_experts=8 is not understood"),
    ({"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
    ({"head_dim": None}, "head_dim missing"),
    ({"rms_norm_eps": None}, "rms_norm_eps missing"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_config_that_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=r"^the file: ") as caught:
        architecture_of(config_of("qwen3", **changes), source="the file")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [("mistral", {"sliding_window": 4096}, "sliding_window=4096"), ("llama", {"mlp_bias": True}, "mlp_bias=True")],
)
def test_options_of_single_families_are_refused_by_name(family, changes, key):
    with pytest.raises(ConfigError, match=key):
        architecture_of(config_of(family, **changes))


def test_a_yarn_factor_on_stretched_positions_is_refused():
    with pytest.raises(ConfigError, match=r"model.yarn_factor=2.0 needs plain rotary positions.*rope_type=llama3"):
        architecture_of(config_of("llama"), yarn_factor=2.0)


def test_a_missing_or_broken_config_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json.*model.path must be"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (ParallelConfig(tp=3), {}, "parallel.tp=3 does not divide the model's 4 attention heads"),
        (ParallelConfig(tp=4), {}, "parallel.tp=4 does not divide the model's 2 key-value heads"),
        (ParallelConfig(tp=2), {"ffn_size": 95}, "parallel.tp=2 does not divide the model's 95 MLP columns"),
        (ParallelConfig(pp=3), {}, "parallel.pp=3 = 3 model chunks do not divide 4 layers"),
        (ParallelConfig(pp=2, vpp=4), {}, "parallel.pp=2 x parallel.vpp=4 = 8 model chunks do not divide 4 layers"),
    ],
)
def test_a_layout_that_does_not_divide_the_network_is_refused(layout, changes, message):
    architecture = replace(architecture_of(config_of("qwen3")), **changes)
    with pytest.raises(ConfigError) as caught:
        check_layout(architecture, layout)
    assert message in str(caught.value)


def test_the_vocabulary_is_padded_to_a_multiple_of_tp_and_no_further():
    architecture = architecture_of(config_of("qwen3"))
    assert [padded_vocab(architecture, tp) for tp in (1, 2, 4, 8)] == [250, 250, 252, 256]
