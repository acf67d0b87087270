#!/usr/bin/env bash
# Triton as a peer to measure against: PyPI's nvidia-pytriton brings the server's program along, so no container is needed.
#
#   triton.sh NAME MODEL.onnx MAX_BATCH GRPC_PORT      in the foreground on loopback, metrics on the port after; SIGINT stops it
#
# It has no ONNX Runtime backend; the model runs in Triton's Python backend, one instance, one thread, dynamic batching as it is by
# default. A Triton with the C++ backend is faster: say which of them a figure is against. The first call installs into
# ${XDG_CACHE_HOME:-~/.cache}/headrace/peers and takes a minute (compare: --start-timeout 300).
set -euo pipefail
if [ $# -ne 4 ]; then
  echo "usage: $0 NAME MODEL.onnx MAX_BATCH GRPC_PORT, got $# arguments" >&2
  exit 2
fi
name=$1 model=$(readlink -f "$2") max_batch=$3 port=$4
here=$(dirname "$(readlink -f "$0")")
home=${XDG_CACHE_HOME:-$HOME/.cache}/headrace/peers/triton
python=$home/venv/bin/python

if [ ! -e "$home/installed" ]; then
  { python3 -m venv "$home/venv" && "$python" -m pip install --quiet nvidia-pytriton==0.7.0 onnxruntime numpy && touch "$home/installed"; } >&2
fi
read -r site lib version < <("$python" -c '
import sys, sysconfig
print(sysconfig.get_path("purelib"), sysconfig.get_config_var("LIBDIR"), "%d.%d" % sys.version_info[:2])')
triton=$site/pytriton/tritonserver

# One directory a process, so that two peers can run; those of processes that are gone are swept here, because exec leaves nobody to.
mkdir -p "$home/runs"
for old in "$home"/runs/*; do
  if [ -d "$old" ] && ! kill -0 "$(basename "$old")" 2>/dev/null; then rm -rf "$old"; fi
done
run=$home/runs/$$
mkdir -p "$run/backends" "$run/models/$name/1"
cp -r "$triton/backends/python" "$run/backends/"
# The stub starts the model's process and is built for one Python.
cp "$triton/python_backend_stubs/$version/triton_python_backend_stub" "$run/backends/python/"
cp "$model" "$run/models/$name/1/model.onnx"
cp "$here/triton_model.py" "$run/models/$name/1/model.py"
"$python" "$here/triton_config.py" "$name" "$model" "$max_batch" >"$run/models/$name/config.pbtxt"

export LD_LIBRARY_PATH=$site/nvidia_pytriton.libs:$lib PATH=$home/venv/bin:$PATH
# What the measuring process needs on its path is not for the model's.
unset PYTHONPATH
exec "$triton/bin/tritonserver" --model-repository="$run/models" --backend-directory="$run/backends" \
  --grpc-address=127.0.0.1 --grpc-port="$port" --allow-http=false --metrics-address=127.0.0.1 --metrics-port=$((port + 1))
