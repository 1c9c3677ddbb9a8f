import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opsd_megatron.models.architecture import architecture_of
from opsd_megatron.models.rotary import TreeRotary, attention_factor, inverse_frequencies, rotate
from tests.tiny_models import LLAMA3, PLAIN, YARN, tiny_config

CASES = [
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 64, "low_freq_factor": 0.5, "high_freq_factor": 3.0, "factor": 32.0},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    YARN,
    {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768, "factor": 2.5},
    {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    {**YARN, "attention_factor": 1.7},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    {**YARN, "factor": 1.0},
]


@pytest.mark.parametrize("parameters", CASES)
@pytest.mark.parametrize("head_dim", [24, 128])
def test_frequencies_and_attention_factor_equal_those_of_transformers(parameters, head_dim):
    config = tiny_config("qwen3", head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=4096)
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    rope = architecture_of(config.to_dict()).rope
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=2e-7, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def test_plain_frequencies_are_powers_of_theta():
    rope = architecture_of(tiny_config("qwen3", rope_parameters=PLAIN).to_dict()).rope
    expected = torch.tensor([1e4 ** (-2 * pair / 24) for pair in range(12)], dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(rope, 24).double(), expected, rtol=3e-7, atol=0)
    assert attention_factor(rope) == 1.0


def test_angles_are_float32_whatever_the_dtype_of_the_model():
    """At position 131071 a bfloat16 frequency would be off by hundreds of radians."""
    rope = architecture_of(tiny_config("qwen3").to_dict()).rope
    cosines, sines = TreeRotary(rope, 24).bfloat16()(torch.tensor([0, 7, 131071]), torch.bfloat16)
    assert cosines.dtype == sines.dtype == torch.bfloat16 and cosines.shape == (3, 1, 12)
    angles = torch.tensor([0, 7, 131071], dtype=torch.float64)[:, None] * 1e4 ** (-torch.arange(12).double() / 12)
    torch.testing.assert_close(cosines[:, 0].double(), angles.cos(), rtol=0, atol=2e-2)
    torch.testing.assert_close(sines[:, 0].double(), angles.sin(), rtol=0, atol=2e-2)


def test_rotation_keeps_lengths_and_its_gradient_is_the_rotation_back():
    generator = torch.Generator().manual_seed(0)
    rope = architecture_of(tiny_config("qwen3").to_dict()).rope
    by = TreeRotary(rope, 24)(torch.arange(5), torch.float64)
    heads = torch.randn(5, 3, 24, generator=generator, dtype=torch.float64).requires_grad_()
    turned = rotate(heads, by)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(torch.autograd.grad(turned, heads, turned.detach())[0], heads)
    assert torch.autograd.gradcheck(lambda given: rotate(given, by), heads)
