"""Compile protos/ into the descriptor set that the package loads: `python scripts/proto.py [--check]`.

One serialized FileDescriptorSet instead of generated modules: it loads into a private pool, beside other packages that
register the same message names, and works with any protobuf runtime.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "server" / "headrace" / "wire" / "descriptors.binpb"


def compile_protos() -> bytes:
    sources = sorted((ROOT / "protos" / "headrace").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors.binpb"
        include = files("grpc_tools") / "_proto"
        arguments = ["protoc", f"-I{ROOT / 'protos'}", f"-I{include}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main([*arguments, *map(str, sources)]) != 0:
            raise SystemExit("protoc failed")
        return out.read_bytes()


def main() -> int:
    compiled = compile_protos()
    if "--check" not in sys.argv:
        TARGET.write_bytes(compiled)
        return 0
    if not TARGET.exists() or TARGET.read_bytes() != compiled:
        print(f"{TARGET.relative_to(ROOT)} is stale: run `make proto`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
