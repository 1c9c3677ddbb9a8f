import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="install does nothing on CUDA")


def run_fresh(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_runs_on_cpu_in_a_fresh_process_and_torch_is_left_as_it_was():
    out = run_fresh(
        """
import torch
before = dict(vars(torch.cuda)), torch.compile, torch.zeros, torch.Tensor.cuda, torch.Tensor.type
import opsd_megatron.models.build  # installs before its first import of megatron
from megatron.core import tensor_parallel, utils
from opsd_megatron.config import ParallelConfig
from opsd_megatron.parallel.mesh import build_mesh
from megatron.core.optimizer import clip_grads
assert all(getattr(torch.cuda, name) is value for name, value in before[0].items())
assert before[1:] == (torch.compile, torch.zeros, torch.Tensor.cuda, torch.Tensor.type)
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    print("torch still refuses cuda")

print(utils.GlobalMemoryBuffer().get_tensor([2], torch.float32, "test").device)
build_mesh(ParallelConfig())  # a job of one rank where there is no torchrun
parameter = torch.nn.Parameter(torch.ones(4))
parameter.grad = torch.full((4,), 3.0)
clip_grads.clip_grad_by_total_norm_fp32([parameter], 3.0, clip_grads.get_grad_norm_fp32([parameter.grad]))
print(parameter.grad.norm().item())

torch.manual_seed(0)
state = torch.get_rng_state()
tracker = tensor_parallel.get_cuda_rng_tracker()
tracker.add("test", 7)
draws = []
for _ in range(2):
    with tracker.fork("test"):
        draws.append(torch.randn(3))
torch.manual_seed(7)
assert torch.equal(torch.cat(draws), torch.cat([torch.randn(3), torch.randn(3)]))
torch.set_rng_state(state)
print("random states kept apart")
"""
    )
    refusal, where, norm, random = out.splitlines()
    assert refusal == "torch still refuses cuda"
    assert where == "cpu"
    assert float(norm) == pytest.approx(3.0, rel=1e-5)
    assert random == "random states kept apart"


def test_installing_after_megatron_was_imported_is_refused_and_a_second_install_does_nothing():
    out = run_fresh(
        """
import megatron.core
from opsd_megatron.parallel import device
try:
    device.install()
except RuntimeError as error:
    print(error)
"""
    )
    assert "was imported before" in out and "call install() first" in out
    from opsd_megatron.parallel import device

    device.install()
    device.install()
