#!/usr/bin/env bash
# Builds the image with buildah, without a Docker engine and without an image registry, and uses it as its own user does.
#   sudo tests/build_image.sh [FOLDER]      # needs root, buildah, debootstrap, uv, 40 GB; a quarter of an hour
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
mkdir -p "$folder/base" "$folder/uv" "$folder/context"
buildah=(buildah --storage-driver overlay)

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

if [ ! -f "$folder/base/base.tar" ]; then
  step "a base: Debian with Python, in place of python:3.12-slim"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-dev,gcc,libc6-dev \
    bookworm "$folder/root" >"$folder/debootstrap.log"
  # the network of this machine may have a certificate authority of its own
  cp /etc/ssl/certs/ca-certificates.crt "$folder/root/etc/ssl/certs/"
  tar -C "$folder/root" -cf "$folder/base/base.tar" .
fi
printf 'FROM scratch\nADD base.tar /\nENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt\n' >"$folder/base/Dockerfile"
"${buildah[@]}" bud --isolation chroot --layers --quiet --tag localhost/wmtp-base "$folder/base"
cp "$(uv run --no-project python -c 'import shutil; print(shutil.which("uv"))')" "$folder/uv/uv"
printf 'FROM scratch\nCOPY uv /uv\n' >"$folder/uv/Dockerfile"
"${buildah[@]}" bud --isolation chroot --layers --quiet --tag localhost/wmtp-uv "$folder/uv"

step "the image"
git ls-files --cached --others --exclude-standard | tar -cf - -T - | tar -C "$folder/context" -xf -
"${buildah[@]}" bud --isolation chroot --layers --tag localhost/wmtp \
  --build-arg BASE_IMAGE=localhost/wmtp-base --build-arg UV_IMAGE=localhost/wmtp-uv "$folder/context"

container=$("${buildah[@]}" from localhost/wmtp)
trap '"${buildah[@]}" rm "$container" >/dev/null' EXIT
inside() { "${buildah[@]}" run --isolation chroot --user 10001:10001 --workingdir /app "$container" -- "$@"; }

step "who runs, and where may be written"
inside sh -euc 'id; for folder in . models datasets checkpoints mlruns logs runs cache; do touch "$folder/.try"; rm "$folder/.try"; done
  if touch .venv/bin/try 2>/dev/null; then echo "the environment may be changed"; exit 1; fi; command -v cc'
step "wmtp plugins"
inside wmtp plugins
step "wmtp check configs/vessl-minitest.toml, configs/vessl.toml"
inside wmtp check configs/vessl-minitest.toml
inside wmtp check configs/vessl.toml
step "wmtp start: the quickstart for some steps"
inside wmtp start examples/quickstart.toml --set train.max_steps=8 --set run.name=try --set train.eval_interval=4 \
  --set data.eval.max_batches=1 --set schedule.warmup_steps=2
inside sh -euc 'ls runs/try runs/try/model; wc -l runs/try/metrics.jsonl'
step "done"
