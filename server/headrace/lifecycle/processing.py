"""What model.toml has done to tensors before and after the model: checked against the artifact, and what clients see of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

from headrace.backends.processing import Processing, classes_of
from headrace.config import CaptureConfig, FeedbackConfig, ModelConfig, PostprocessConfig, PreprocessConfig, TensorConfig
from headrace.errors import ConfigError, LoadError
from headrace.signature import DataType, Shape, TensorSpec, format_shape

Labels = Mapping[str, tuple[str, ...]]

_TAKEN: Mapping[DataType, Literal["float32", "float16", "bfloat16"]] = {
    DataType.FP32: "float32",
    DataType.FP16: "float16",
    DataType.BF16: "bfloat16",
}
_SCORES = (DataType.FP32, DataType.FP16, DataType.BF16, DataType.FP64)


@dataclass(frozen=True, slots=True)
class Visible:
    """What clients see. `config` and `labels` say of those tensors what they said of the artifact's. `notes`: what is done, a sentence
    for each tensor."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    processing: Processing
    config: ModelConfig
    labels: Labels
    notes: tuple[str, ...]


def apply_processing(config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], labels: Labels) -> Visible:
    """The tensors are those of the artifact, after `[[input]]` and `[[output]]`. The steps' names are known to be among them.

    Raises LoadError where a step does not fit the artifact, ConfigError for one that makes no sense by itself.
    """
    before = {step.input: step for step in config.preprocess}
    after = {step.output: step for step in config.postprocess}
    normalize = {spec.name: _normalize(config.name, spec, before[spec.name]) for spec in inputs if spec.name in before}
    take = {spec.name: _take(config.name, spec, after[spec.name]) for spec in outputs if spec.name in after}
    processing = Processing(normalize, take)
    seen = [_image(spec, normalize[spec.name], before[spec.name]) if spec.name in normalize else spec for spec in inputs]
    given = [each for spec in outputs for each in _answers(spec, take.get(spec.name))]
    _check_free(config.name, outputs, take)
    notes = [f"input '{spec.name}': {_describe_input(spec, normalize[spec.name])}" for spec in inputs if spec.name in normalize]
    notes += [f"output '{name}': {_describe_output(step)}" for name, step in take.items()]
    ranked = {name for name, step in take.items() if isinstance(step, TopK)}
    return Visible(
        tuple(seen),
        tuple(given),
        processing,
        replace(
            config,
            outputs=tuple(_settings(config, given, after, ranked)),
            capture=_capture(config.capture, ranked),
            feedback=_feedback(config.feedback, outputs, ranked, labels),
        ),
        {classes_of(name) if name in ranked else name: names for name, names in labels.items()},
        tuple(notes),
    )


# -- before the model ------------------------------------------------------------------------------------------------------


def _normalize(model: str, spec: TensorSpec, step: PreprocessConfig) -> Normalize:
    where = f"[[preprocess]] of input '{spec.name}' of '{model}'"
    if spec.datatype not in _TAKEN:
        raise LoadError(f"{where}: expected FP32, FP16 or BF16 in the model, got {spec.datatype.value}")
    if len(step.size) not in (0, 2):
        raise ConfigError(f"{where}: size: expected height and width, got {list(step.size)}")
    size = cast("tuple[int, int] | None", step.size or None)
    try:
        made = Normalize(
            size=size,
            antialias=step.antialias,
            scale=step.scale,
            mean=step.mean,
            deviation=step.deviation,
            reverse_channels=step.channels == "bgr",
            layout="NCHW" if step.layout == "NCHW" else "NHWC",
            datatype=_TAKEN[spec.datatype],
        )
    except ValueError as error:
        reason = str(error)
    else:
        _check_images(where, spec, made)
        return made
    raise ConfigError(f"{where}: {reason}")


def _check_images(where: str, spec: TensorSpec, step: Normalize) -> None:
    names = "[rows, channels, height, width]" if step.layout == "NCHW" else "[rows, height, width, channels]"
    if len(spec.shape) != 4:
        raise LoadError(f"{where}: expected four dimensions in the model, {names}, got {format_shape(spec.shape)}")
    _, height, width, channels = _as_nhwc(spec.shape, step.layout)
    got = f"the model has {format_shape(spec.shape)}, read as {names} by layout '{step.layout}'"
    if channels < 0 and step.channels is None:
        raise LoadError(f"{where}: expected a fixed number of channels, or a mean for each; {got}")
    if channels >= 0 and step.channels not in (None, channels):
        raise LoadError(f"{where}: mean, deviation: expected one number, or {channels}, got {step.channels}; {got}")
    if step.reverse_channels and channels not in (-1, 3):
        raise LoadError(f"{where}: channels 'bgr': expected 3 channels, got {channels}; {got}")
    if step.size is not None and any(side not in (-1, wanted) for side, wanted in zip((height, width), step.size, strict=True)):
        raise LoadError(f"{where}: size: expected {height} and {width}, got {step.size[0]} and {step.size[1]}; {got}")


def _as_nhwc(shape: Shape, layout: str) -> Shape:
    return (shape[0], *shape[2:], shape[1]) if layout == "NCHW" else shape


def _image(spec: TensorSpec, step: Normalize, config: PreprocessConfig) -> TensorSpec:
    rows, height, width, channels = _as_nhwc(spec.shape, step.layout)
    if step.size is not None:
        height = width = -1
    shape = (rows, height, width, channels if channels >= 0 else step.channels or -1)
    return replace(spec, datatype=DataType.UINT8, shape=shape, max_pixels=config.max_pixels if -1 in shape[1:3] else 0)


def _describe_input(spec: TensorSpec, step: Normalize) -> str:
    parts = []
    if step.size is not None:
        parts.append(f"resized to {step.size[0]} x {step.size[1]}{', antialiased' if step.antialias else ''}")
    formula = f"x * {step.scale:.6g}"
    if any(step.mean):
        formula = f"({formula} - {_numbers(step.mean)})"
    if set(step.deviation) != {1.0}:
        formula += f" / {_numbers(step.deviation)}"
    parts.append(formula)
    if step.reverse_channels:
        parts.append("channels reversed")
    return "; ".join([*parts, f"{spec.datatype.value} {format_shape(spec.shape)} {step.layout} to the model"])


def _numbers(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"[{', '.join([f'{value:g}' for value in values])}]"


# -- after the model -------------------------------------------------------------------------------------------------------


def _take(model: str, spec: TensorSpec, step: PostprocessConfig) -> TopK | Softmax:
    where = f"[[postprocess]] of output '{spec.name}' of '{model}'"
    if spec.datatype not in _SCORES:
        raise LoadError(f"{where}: expected a floating output of the model, got {spec.datatype.value}")
    got = f"the model has {format_shape(spec.shape)}"
    if not step.top_k:
        if len(spec.shape) < 2:
            raise LoadError(f"{where}: softmax: expected two dimensions or more, the last of which is of classes; {got}")
        return Softmax()
    if len(spec.shape) != 2 or spec.shape[1] < 0:
        raise LoadError(
            f"{where}: top_k: expected [rows, classes] with a fixed number of classes; {got}, and shape of its [[output]] sets what is free"
        )
    if step.top_k > spec.shape[1]:
        raise LoadError(f"{where}: top_k: expected at most {spec.shape[1]} classes, got {step.top_k}; {got}")
    return TopK(step.top_k, step.softmax)


def _answers(spec: TensorSpec, step: TopK | Softmax | None) -> Iterator[TensorSpec]:
    if step is None:
        yield spec
        return
    if isinstance(step, Softmax):
        yield replace(spec, datatype=DataType.FP32)
        return
    ranking = replace(spec, datatype=DataType.FP32, shape=(spec.shape[0], step.k), is_ranked=True)
    yield ranking
    yield replace(ranking, name=classes_of(spec.name), datatype=DataType.INT32)


def _check_free(model: str, outputs: Sequence[TensorSpec], take: Mapping[str, TopK | Softmax]) -> None:
    names = {spec.name for spec in outputs}
    for name, step in take.items():
        if isinstance(step, TopK) and classes_of(name) in names:
            raise LoadError(
                f"[[postprocess]] of output '{name}' of '{model}': top_k: expected no output '{classes_of(name)}' in the model, it has one"
            )


def _describe_output(step: TopK | Softmax) -> str:
    if isinstance(step, Softmax):
        return "softmax"
    return f"{'softmax, ' if step.softmax else ''}the {step.k} largest and their classes"


# -- what model.toml says of the tensors -------------------------------------------------------------------------------------


def _settings(
    config: ModelConfig, outputs: Sequence[TensorSpec], after: Mapping[str, PostprocessConfig], ranked: set[str]
) -> Iterator[TensorConfig]:
    """Drift watches the places of a ranking one by one, values as numbers and classes as categories; labels are the classes'."""
    given = {setting.name: setting for setting in config.outputs}
    for name in [spec.name for spec in outputs]:
        source = next((each for each in ranked if classes_of(each) == name), None)
        setting = given.get(name, TensorConfig(name))
        if source is not None:
            labels = setting.labels or (given[source].labels if source in given else None)
            yield replace(setting, labels=labels, monitor=_auto(setting.monitor, "categories"))
        elif name in ranked:
            _check_monitor(config.name, setting)
            yield replace(setting, labels=None, monitor=_auto(setting.monitor, "columns"))
        elif name in after:
            yield replace(setting, activation=_probabilities(config.name, setting))
        elif name in given:
            yield setting


def _auto(monitor: str, what: str) -> str:
    return what if monitor == "auto" else monitor


def _check_monitor(model: str, setting: TensorConfig) -> None:
    if setting.monitor == "classes" or setting.activation != "auto":
        raise ConfigError(
            f"output '{setting.name}' of '{model}': monitor 'classes' and activation: expected neither beside top_k, which leaves no "
            "scores of all classes"
        )


def _probabilities(model: str, setting: TensorConfig) -> str:
    if setting.activation == "logits":
        raise ConfigError(f"output '{setting.name}' of '{model}': activation: expected probabilities beside softmax, got logits")
    return "probabilities"


def _capture(config: CaptureConfig, ranked: set[str]) -> CaptureConfig:
    """What is not to be written of scores is not to be written of their classes."""
    added = [classes_of(name) for name in config.redact if name in ranked and classes_of(name) not in config.redact]
    return replace(config, redact=(*config.redact, *added))


def _feedback(config: FeedbackConfig, outputs: Sequence[TensorSpec], ranked: set[str], labels: Labels) -> FeedbackConfig:
    """Labels are for the first of the classes where they were for scores; where nothing is said, those with names before others."""
    wanted = config.output
    if not wanted and not any(name not in ranked for name in labels):
        wanted = next((spec.name for spec in outputs if spec.name in ranked), "")
    return replace(config, output=classes_of(wanted)) if wanted in ranked else config
