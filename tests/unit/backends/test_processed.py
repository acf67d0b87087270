"""numpy around a backend: what it is given, asked for and answers, on the host and beside a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from headrace.backends.base import Array, ArtifactSignature, Backend, Pending, PipelinedBackend
from headrace.backends.processed import processed
from headrace.backends.processing import Processing
from headrace.config import InstanceConfig
from headrace.errors import BackendError
from headrace.signature import DataType, TensorSpec
from headrace.testing import FakeBackend
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

ARTIFACT = ArtifactSignature(
    (TensorSpec("image", DataType.FP32, (-1, 1, 2, 2)), TensorSpec("bias", DataType.FP32, (-1, 4), True)),
    (TensorSpec("scores", DataType.FP32, (-1, 4)), TensorSpec("double", DataType.FP32, (-1, 4)), TensorSpec("raw", DataType.FP32, (-1, 4))),
)
OUTPUTS = [spec.name for spec in ARTIFACT.outputs]
IMAGE = Normalize(scale=1.0)
PROCESSING = Processing({"image": IMAGE}, {"scores": TopK(2), "double": Softmax()})
PIXELS = np.array([[3, 9, 1, 9], [8, 0, 0, 2]], np.uint8)
BATCH = PIXELS.reshape(2, 2, 2, 1)


def compute(inputs: Mapping[str, Array]) -> list[Array]:
    flat = inputs["image"].reshape(len(inputs["image"]), -1) + inputs.get("bias", np.float32(0))
    return [flat, 2 * flat, flat.copy()]


def fake(made: type[FakeBackend] | None = None) -> FakeBackend:
    return (made or FakeBackend.make(compute, artifact=ARTIFACT))(Path("model.fake"), InstanceConfig())


def test_images_go_in_and_the_largest_come_out() -> None:
    inner = fake()
    values, classes, double, raw = processed(inner, PROCESSING, OUTPUTS).execute({"image": BATCH}, None)
    np.testing.assert_array_equal(inner.batches[0]["image"], PIXELS.reshape(2, 1, 2, 2).astype(np.float32))
    assert values.tolist() == [[9, 9], [8, 2]]
    assert classes.tolist() == [[1, 3], [0, 3]]
    np.testing.assert_array_equal(double, Softmax()(2 * PIXELS.astype(np.float32)))
    np.testing.assert_array_equal(raw, PIXELS)


@pytest.mark.parametrize("wanted", [["scores_classes"], ["raw", "scores_classes", "scores"], ["double"], ["scores", "double"]])
def test_outputs_come_in_the_order_that_was_asked_for(wanted: list[str]) -> None:
    backend = processed(fake(), PROCESSING, OUTPUTS)
    every = dict(zip(["scores", "scores_classes", "double", "raw"], backend.execute({"image": BATCH}, None), strict=True))
    found = backend.execute({"image": BATCH}, wanted)
    for name, array in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(array, every[name])


def test_other_inputs_pass_as_they_are_and_absent_ones_stay_absent() -> None:
    inner = fake()
    backend, bias = processed(inner, PROCESSING, OUTPUTS), np.ones((2, 4), np.float32)
    backend.execute({"image": BATCH, "bias": bias}, ["raw"])
    assert inner.batches[0]["bias"] is bias
    optional = Processing({"bias": IMAGE, "image": IMAGE})
    processed(inner, optional, OUTPUTS).execute({"image": BATCH}, ["raw"])
    assert list(inner.batches[1]) == ["image"]


class Adopting(FakeBackend):
    artifact = ARTIFACT
    behaviour = staticmethod(compute)
    live: ClassVar[list[FakeBackend]] = []
    adopted: Processing | None = None

    def adopt(self, processing: Processing) -> bool:
        self.adopted = processing
        return True


def test_a_backend_that_does_it_itself_is_left_alone() -> None:
    inner = fake(Adopting)
    assert processed(inner, PROCESSING, OUTPUTS) is inner
    assert isinstance(inner, Adopting)
    assert inner.adopted is PROCESSING


def test_nothing_to_do_is_nothing_around_it() -> None:
    inner = fake(Adopting)
    assert processed(inner, Processing(), OUTPUTS) is inner
    assert isinstance(inner, Adopting)
    assert inner.adopted is None


def test_it_lives_as_the_one_inside_does() -> None:
    class Local(FakeBackend):
        artifact = ARTIFACT
        behaviour = staticmethod(compute)
        live: ClassVar[list[FakeBackend]] = []
        works_on_the_caller = True
        shrunk: Mapping[str, Array] | None = None
        device = "cuda:3"
        device_memory = 7

        def shrink(self, inputs: Mapping[str, Array]) -> None:
            self.shrunk = inputs

    inner = fake(Local)
    backend = processed(inner, PROCESSING, OUTPUTS)
    assert backend.works_on_the_caller
    assert not processed(fake(), PROCESSING, OUTPUTS).works_on_the_caller
    backend.load()
    assert inner in Local.live
    backend.warm({"image": BATCH})
    backend.shrink({"image": BATCH[:1]})
    assert isinstance(inner, Local)
    assert inner.shrunk is not None
    assert inner.shrunk["image"].dtype == inner.batches[0]["image"].dtype == np.float32
    assert (backend.device, backend.device_memory) == ("cuda:3", 7)
    backend.close()
    assert Local.live == []


def test_scores_that_the_artifact_did_not_declare_fail_the_batch_by_name() -> None:
    inner = fake(FakeBackend.make(lambda inputs: [np.zeros((2, 1), np.float32)] * 3, artifact=ARTIFACT))
    with pytest.raises(BackendError, match=r"output 'scores': scores: expected \[rows, 2 classes or more\], got \[2, 1\]"):
        processed(inner, PROCESSING, OUTPUTS).execute({"image": BATCH}, ["scores"])


# -- beside a device ---------------------------------------------------------------------------------------------------------


class Later(Pending):
    def __init__(self, owner: Device, arrays: list[Array]) -> None:
        self._owner = owner
        self._arrays = arrays

    def wait(self) -> list[Array]:
        self._owner.events.append("wait")
        return self._arrays

    def release(self) -> None:
        self._owner.events.append("release")
        for array in self._arrays:
            array.fill(np.nan)  # as the next batch would


class Device(PipelinedBackend):
    """Computes at once what a device would later, in host memory; of streams and copies it shows nothing."""

    name, default_filename, platform = "device", "model.device", "device"
    lanes = 3

    def __init__(self) -> None:
        super().__init__(Path("model.device"), InstanceConfig())
        self.memory = {"image": np.zeros((4, 1, 2, 2), np.float32), "bias": np.zeros((4, 4), np.float32)}
        self.given: list[Mapping[str, Array]] = []
        self.events: list[str] = []

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        return ARTIFACT

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        return 0

    def load(self) -> None: ...

    def close(self) -> None: ...

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        fitting = {name: self.memory[name][: shape[0]] for name, shape in shapes.items() if shape[1:] == self.memory[name].shape[1:]}
        return fitting

    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        self.given.append(inputs)
        arrays = dict(zip(OUTPUTS, compute(inputs), strict=True))
        return Later(self, [arrays[name] for name in (OUTPUTS if outputs is None else outputs)])


def around(device: Device) -> PipelinedBackend:
    backend: Backend = processed(device, PROCESSING, OUTPUTS)
    assert isinstance(backend, PipelinedBackend)
    return backend


def test_a_pipelined_backend_stays_one() -> None:
    backend = around(Device())
    assert backend.lanes == 3
    assert not backend.works_on_the_caller


def test_answers_of_a_launched_batch_outlive_its_buffers() -> None:
    device = Device()
    pending = around(device).launch({"image": BATCH}, ["scores", "scores_classes"])
    values, classes = pending.wait()
    pending.release()
    assert device.events == ["wait", "release"]
    assert values.tolist() == [[9, 9], [8, 2]]
    assert classes.tolist() == [[1, 3], [0, 3]]


def test_prepared_images_are_written_where_the_device_reads_from() -> None:
    device = Device()
    backend, bias = around(device), np.ones((2, 4), np.float32)
    staged = backend.stage({"image": BATCH.shape, "bias": (2, 4)})
    assert list(staged) == ["bias"]
    assert np.shares_memory(staged["bias"], device.memory["bias"])
    backend.launch({"image": BATCH, "bias": bias}, None)
    assert np.shares_memory(device.given[0]["image"], device.memory["image"])
    np.testing.assert_array_equal(device.given[0]["image"].ravel(), PIXELS.ravel())
    # What was staged for one batch is not the next one's.
    backend.launch({"image": BATCH}, None)
    assert not np.shares_memory(device.given[1]["image"], device.memory["image"])


def test_one_batch_start_to_end_on_a_device() -> None:
    found = around(Device()).execute({"image": BATCH}, ["scores_classes", "raw"])
    assert found[0].tolist() == [[1, 3], [0, 3]]
    np.testing.assert_array_equal(found[1], PIXELS)
