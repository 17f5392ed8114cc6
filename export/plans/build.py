"""One graph to one plan, with names that TensorRT 10.16 and 11 share. Every network is strongly typed.

Weights are not copied: the parser reads the mapped files. The plan holds none of them, and each is set when an engine
opens, so one plan serves all checkpoints of the same network. Constants inside of the graph stay in the plan.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tilewright.export.plans.inspector import Inspected, inspected
from tilewright.export.plans.profiles import Profile
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines.tensorrt import logger
from tilewright.runtime.errors import BuildError, EnvironmentMismatch, ResourceError

__all__ = ["Built", "Options", "build_plan"]

LEVEL = 3  # of the search for kernels: NVIDIA's own FLUX demo takes 3, "to reduce GPU memory"
MEMORY = "out of memory|outofmemory|could not find any implementation"


@dataclass(frozen=True)
class Options:
    """How plans are made."""

    tiles: tuple[int, ...] = ()  # sides of tiles, one profile each; none: the bundle's own
    batches: tuple[int, ...] = ()  # numbers of tiles in a call, one profile each; none: the bundle's own
    stream: bool = False  # an engine opened with `--memory low` may leave weights in the host's memory
    level: int = LEVEL
    timings: Path | None = None  # the timing cache; none: the one of this GPU


@dataclass(frozen=True)
class Built:
    """A plan, and what TensorRT said of it."""

    plan: bytes
    timings: bytes
    inspected: Inspected
    memory: int  # bytes on the GPU for the values inside of a call


def build_plan(
    graph: bytes,
    weights: Mapping[str, npt.NDArray[Any]],
    profiles: Sequence[Profile],
    options: Options,
    timings: bytes = b"",
    *,
    what: str,
) -> Built:
    """Compile a graph. `weights`: the bytes of each initializer that is not in the graph; `what` begins complaints."""
    import tensorrt as trt

    logger().told.clear()
    builder = trt.Builder(logger())
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger())
    _parse(parser, graph, weights, what)
    for name in weights:
        if not network.mark_weights_refittable(name):
            raise BuildError(f"{what}: TensorRT {trt.__version__} has no weight {name!r} in its network")
    _let_attention_be_decomposed(trt, network)
    config = _config(trt, builder, profiles, options)
    if not config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False):
        raise EnvironmentMismatch(f"{what}: TensorRT refuses the timing cache; remove it, or name another")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(what, trt.__version__)
    data = bytes(plan)
    engine = trt.Runtime(logger()).deserialize_cuda_engine(data)
    if engine is None:
        raise _failed(what, trt.__version__)
    report = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return Built(data, bytes(config.get_timing_cache().serialize()), inspected(report), engine.device_memory_size_v2)


def _network_flags(trt: Any) -> int:
    flag = trt.NetworkDefinitionCreationFlag  # 11 ignores the first, as it knows no other networks
    return int(1 << int(flag.STRONGLY_TYPED) | 1 << int(flag.PREFER_AOT_PYTHON_PLUGINS))


def _parse(parser: Any, graph: bytes, weights: Mapping[str, npt.NDArray[Any]], what: str) -> None:
    """Read the graph, with each weight at its place in memory."""
    read = parser.load_model_proto(graph)
    for name, array in weights.items():
        read = read and parser.load_initializer(name, array.ctypes.data, array.nbytes)
    if read and parser.parse_model_proto():
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in errors] or logger().told or ["no reason told"]
    more = f" and {len(told) - 1} more" if len(told) > 1 else ""
    advice = "'tilewright export lint' finds what TensorRT does not read"
    raise BuildError(f"{what}: TensorRT does not read the graph ({one_line(told[0])}{more}); {advice}")


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Without this, an attention that no fused kernel can compute fails the build."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _config(trt: Any, builder: Any, profiles: Sequence[Profile], options: Options) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells names only
    config.max_aux_streams = 0  # less memory, and calls can be recorded
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    for flag in (trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_INDIVIDUAL):
        config.set_flag(flag)
    if options.stream:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for profile in profiles:
        listed = builder.create_optimization_profile()
        for name, (least, usual, most) in profile.items():
            listed.set_shape(name, least, usual, most)
        if config.add_optimization_profile(listed) < 0:
            raise BuildError(f"TensorRT refuses the profile {profile}; use a smaller --tile or --batch")
    return config


def _failed(what: str, version: str) -> Exception:
    told = one_line((logger().told or ["without a message"])[-1])
    message = f"{what}: TensorRT {version} makes no plan ({told})"
    if re.search(MEMORY, told, re.IGNORECASE):  # the second is what it says if no kernel fits into memory
        return ResourceError(f"{message}; free the GPU, or use a smaller --tile, --batch or --level")
    return BuildError(message)
