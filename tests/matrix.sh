#!/usr/bin/env bash
# Builds and tests with one pair of versions, in a temporary environment that is deleted afterwards.
#
#   tests/matrix.sh 3.13 2.11.0                 Python (or the path of one) and torch
#   tests/matrix.sh 3.12 newest tests/cpu -x    the newest torch; arguments for pytest
#
# Python is looked for on the PATH and among pyenv's. Takes 6 GB under TMPDIR. Without CUDA, unless
# FORCE_CPU=0.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# < 2)); then
  sed -n '2,7s/^# \?//p' "$0" >&2
  exit 2
fi

found() {
  local candidate
  for candidate in "$1" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    # One of pyenv's shims may stand for a version that is not there.
    if "$candidate" -c "" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python $1: neither on the PATH nor among pyenv's" >&2
  return 1
}

python=$(found "$1")
if [ "$2" = newest ]; then torch=">=2.11"; else torch="==${2#==}"; fi
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory="$folder"
export PIP_NO_CACHE_DIR=1 FORCE_CPU=${FORCE_CPU:-1}
status=0
make -C "$folder" test PYTHON="$python" TORCH="$torch" PYTEST_ARGS="$*" || status=$?
installed=$("$folder/.venv/bin/python" -c 'import torch; print(torch.__version__)' || echo "$torch")
echo "$("$python" -V), torch $installed: $( ((status)) && echo failed || echo passed)"
exit "$status"
