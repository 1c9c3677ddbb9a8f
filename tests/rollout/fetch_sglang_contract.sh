#!/bin/bash
# Fetches the wheel of SGLang (39 MB), takes its request contract out, and runs the test that holds our requests to it.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest "$work" sglang==0.5.23
python -m pip install --quiet --target "$work/packages" msgspec
python -m zipfile -e "$work"/sglang-*.whl "$work/wheel"
PYTHONPATH="$work/packages:${PYTHONPATH:-.}" OPSD_SGLANG_API_TYPES="$work/wheel/sglang/api/v1/api_types.py" \
  python -m pytest tests/rollout/test_adapters.py -k contract_of_sglangs_wheel
