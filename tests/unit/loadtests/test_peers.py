import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from loadtests.peers.triton_config import config

PEERS = Path(__file__).parents[3] / "loadtests" / "peers"
TENSORS = (
    [SimpleNamespace(name="x", type="tensor(float)", shape=["batch", 3, "width"])],
    [
        SimpleNamespace(name="y", type="tensor(uint8)", shape=["batch", 2]),
        SimpleNamespace(name="z", type="tensor(string)", shape=["batch"]),
    ],
)


def parsed(max_batch: int) -> pb.ModelConfig:
    return text_format.Parse(config("m", *TENSORS, max_batch), pb.ModelConfig())


def test_tritons_configuration_says_what_the_model_takes_and_gives() -> None:
    made = parsed(64)
    assert [(tensor.name, tensor.data_type, [*tensor.dims]) for tensor in [*made.input, *made.output]] == [
        ("x", pb.TYPE_FP32, [3, -1]), ("y", pb.TYPE_UINT8, [2]), ("z", pb.TYPE_STRING, []),
    ]  # fmt: skip
    assert made.max_batch_size == 64
    assert made.HasField("dynamic_batching")


def test_without_batches_the_first_size_is_one_like_the_others() -> None:
    made = parsed(0)
    assert [*made.input[0].dims] == [-1, 3, -1]
    assert not made.HasField("dynamic_batching")


@pytest.mark.parametrize("script", ["triton.sh", "mlserver.sh"])
def test_a_peer_says_how_it_is_called(script: str) -> None:
    done = subprocess.run(["bash", PEERS / script, "name"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "NAME MODEL.onnx MAX_BATCH GRPC_PORT, got 1 arguments" in done.stderr
