#!/usr/bin/env bash
# Makes a wheel for the CPU from the source archive in dist/, and tries it in a new environment.
#
# PYTHON (default: python3) builds it and lends its torch to that environment, which has nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
version=$("$python" -c 'exec(open("wus_ext/_version.py").read()); print(__version__)')

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
FORCE_CPU=1 "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$folder" \
  "dist/wus_ext-$version.tar.gz"
wheel=$(echo "$folder"/*.whl)
if [ "$(uname)" = Linux ]; then
  # torch brings these libraries, OpenMP's included.
  PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --wheel-dir "$folder/repaired" \
    --exclude "libtorch*" --exclude "libc10*" --exclude "libgomp*" "$wheel"
  wheel=$(echo "$folder"/repaired/*.whl)
fi
cp "$wheel" dist/

"$python" -m venv "$folder/new"
"$folder/new/bin/pip" install --quiet --no-deps "$wheel"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
packages "$python" > "$(packages "$folder/new/bin/python")/lent.pth"
cp tests/smoke.py "$folder"
cd "$folder"
new/bin/python smoke.py "$folder/new"
new/bin/wus-ext train --model vgg11 --dataset digits --method wus --epochs 2 --warmup 1 \
  --limit-train 64 --limit-test 64 --batch-size 32 --out run
echo "dist/$(basename "$wheel"): passed"
