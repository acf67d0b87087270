#!/usr/bin/env bash
# MLServer as a peer to measure against, with ONNX Runtime in a runtime of our own: it has none for ONNX.
#
#   mlserver.sh NAME MODEL.onnx MAX_BATCH GRPC_PORT    in the foreground on loopback, HTTP on the port after; SIGINT stops it
#
# One process (with parallel workers each request takes a hop more), adaptive batching that waits a millisecond at most. The first call installs into ${XDG_CACHE_HOME:-~/.cache}/headrace/peers (compare: --start-timeout 300).
set -euo pipefail
if [ $# -ne 4 ]; then
  echo "usage: $0 NAME MODEL.onnx MAX_BATCH GRPC_PORT, got $# arguments" >&2
  exit 2
fi
name=$1 model=$(readlink -f "$2") max_batch=$3 port=$4
here=$(dirname "$(readlink -f "$0")")
home=${XDG_CACHE_HOME:-$HOME/.cache}/headrace/peers/mlserver
python=$home/venv/bin/python

if [ ! -e "$home/installed" ]; then
  { python3 -m venv "$home/venv" && "$python" -m pip install --quiet mlserver==1.7.1 onnxruntime && touch "$home/installed"; } >&2
fi

# One directory a process, so that two peers can run; those of processes that are gone are swept here, because exec leaves nobody to.
mkdir -p "$home/runs"
for old in "$home"/runs/*; do
  if [ -d "$old" ] && ! kill -0 "$(basename "$old")" 2>/dev/null; then rm -rf "$old"; fi
done
run=$home/runs/$$
mkdir -p "$run/$name"
cp "$model" "$run/$name/model.onnx"
cp "$here/mlserver_runtime.py" "$run/$name/"
cat >"$run/settings.json" <<S
{"debug": false, "host": "127.0.0.1", "grpc_port": $port, "http_port": $((port + 1)), "metrics_endpoint": null, "parallel_workers": 0}
S
cat >"$run/$name/model-settings.json" <<S
{"name": "$name", "implementation": "mlserver_runtime.OnnxRuntime", "max_batch_size": $max_batch, "max_batch_time": 0.001,
 "parameters": {"uri": "./model.onnx"}}
S

# What the measuring process needs on its path is not for the model's.
unset PYTHONPATH
cd "$run"
exec "$home/venv/bin/mlserver" start "$run"
