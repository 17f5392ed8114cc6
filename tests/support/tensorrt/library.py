"""What the library under TensorRT's bindings does in tests: it reads ONNX, makes plans, and runs them in NumPy.

The bindings are the real ones, so each name, argument and type that Tilewright uses is checked by them. Behind them,
a plan is JSON with the graph and without the weights, and a call runs the graph with the weights of the refit.
Nothing here says how fast or how exact TensorRT is.
"""

import base64
import ctypes
import inspect
import json
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

__all__ = ["Library"]

FACTORY = -1
KINDS = ("builder", "refitter", "runtime", "parser", "network", "config", "profile", "error", "tensor", "cache")
KINDS += ("memory", "engine", "context", "inspector", "layer")
# method -> its number in 10.16 and in 11.4, as the bindings call it
METHODS: dict[str, dict[str, tuple[int, int]]] = {
    "builder": {"network": (8, 6), "config": (7, 5), "profile": (9, 7), "build": (14, 11)},
    "refitter": {"validate": (23, 19), "all": (15, 11), "missing": (14, 10), "set": (13, 9), "set_at": (19, 15)}
    | {"prototype": (26, 22), "refit": (4, 4), "refit_async": (25, 21)},
    "runtime": {"deserialize": (3, 3)},
    "parser": {"load": (21, 19), "weight": (22, 20), "parse": (23, 21), "errors": (5, 3), "error": (6, 4)},
    "network": {"inputs": (14, 14), "outputs": (16, 16), "layers": (12, 12), "layer": (13, 13), "refittable": (72, 69)},
    "config": {"level": (47, 36), "verbosity": (27, 25), "pool": (43, 32), "streams": (54, 43), "flag": (11, 9)}
    | {"clear": (10, 8), "add_profile": (25, 23), "cache": (40, 29), "set_cache": (41, 30), "get_cache": (42, 31)},
    "profile": {"set": (2, 2), "valid": (9, 7)},
    "error": {"code": (0, 0), "text": (1, 1), "file": (2, 2), "line": (3, 3), "function": (4, 4), "node": (5, 5)}
    | {"node_name": (6, 6), "operator": (7, 7), "stack": (9, 9)},
    "cache": {"serialize": (2, 2)},
    "memory": {"data": (2, 2), "size": (3, 3), "type": (4, 4)},
    "engine": {"context": (5, 5), "tensors": (30, 26), "tensor": (31, 27), "mode": (23, 19), "type": (20, 16)}
    | {"shape": (19, 15), "profiles": (10, 8), "profile_shape": (29, 25), "memory": (52, 44), "inspector": (18, 14)}
    | {"streamable": (46, 38), "automatic": (50, 42), "budget": (48, 40), "refittable": (8, 6)},
    "context": {"engine": (7, 7), "profile": (17, 16), "input": (21, 20), "infer": (28, 27), "update": (48, 47)}
    | {"memory": (49, 48), "address": (24, 23), "run": (37, 36), "shape": (22, 21)},
    "inspector": {"information": (6, 6), "context": (3, 3)},
    "layer": {"type": (2, 2)},
}
RETURNS_STRUCT = {("engine", "shape"), ("engine", "profile_shape"), ("context", "shape"), ("refitter", "prototype")}
HANDLER = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_int, *[ctypes.c_long] * 9)
CAPTURED = ctypes.CFUNCTYPE(None)
TYPES = {
    1: "FLOAT",
    10: "HALF",
    16: "BF16",
    17: "FP8",
    3: "INT8",
    7: "INT64",
    6: "INT32",
    9: "BOOL",
}  # of ONNX -> of TensorRT
WIDTHS = {"FLOAT": 4, "HALF": 2, "BF16": 2, "FP8": 1, "INT8": 1, "INT64": 8, "INT32": 4, "BOOL": 1}
ERROR = 1  # a logger's severity
LOG = (0, 4)  # the number of its method


class Dims(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int), ("sizes", ctypes.c_int64 * 8))


class Weights(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def text(address: int) -> str:
    return ctypes.string_at(address).decode()


class Library:
    """Answers the calls of the bindings. `fails`: a part that fails, to see how that is told."""

    def __init__(self, path: str, driver: str, trt: Any) -> None:
        self.trt, self.fails = trt, os.environ.get("STUB_FAILS", "")
        self.major = 0 if trt.__version__.startswith("10.") else 1
        self.library, self.driver = ctypes.CDLL(path), ctypes.CDLL(driver)
        self.library.stub_object.restype = ctypes.c_void_p
        self.objects: dict[int, Any] = {}
        self.kept: list[Any] = []  # memory that the bindings read later
        self.calls: list[str] = []  # every call, as "builder.build"
        self.captured: list[Any] = []
        self.names = {
            (kind, numbers[self.major]): (name, method)
            for kind, name in enumerate(KINDS)
            for method, numbers in METHODS.get(name, {}).items()
        }
        self.handler, self.replay = HANDLER(self._called), CAPTURED(self._replay)
        self.library.stub_handler(self.handler)
        self.driver.stub_replay(self.replay)

    def _called(self, kind: int, number: int, *arguments: int) -> int:
        try:
            if number == FACTORY:
                return self._made(KINDS[kind], *arguments[:2])
            name, method = self.names.get((kind, number), (KINDS[kind] if kind < len(KINDS) else "registry", number))
            self.calls.append(f"{name}.{method}")
            answer = getattr(self, f"{name}_{method}", None)
            if answer is None:
                return 0 if isinstance(method, int) else 1
            if (name, method) in RETURNS_STRUCT:  # the place of the result comes first
                arguments = (arguments[1], arguments[0], *arguments[2:])
            code = answer.__func__.__code__
            rest = arguments[1:] if code.co_flags & inspect.CO_VARARGS else arguments[1 : code.co_argcount - 1]
            returned = answer(self.objects[arguments[0]], *rest)
            return arguments[1] if (name, method) in RETURNS_STRUCT else int(returned or 0)
        except Exception as error:  # it cannot pass through the library
            self.calls.append(f"raised {error!r}")
            return 0

    def new(self, kind: str, **values: Any) -> int:
        address: int = self.library.stub_object(KINDS.index(kind))
        self.objects[address] = SimpleNamespace(address=address, **values)
        return address

    def keep(self, data: bytes) -> int:
        buffer = ctypes.create_string_buffer(data, len(data) + 1)
        self.kept.append(buffer)
        return ctypes.addressof(buffer)

    def log(self, logger: int, message: str) -> None:
        self.library.stub_log(ctypes.c_void_p(logger), LOG[self.major], ERROR, message.encode())

    def _made(self, kind: str, first: int, second: int) -> int:
        if kind == "parser":
            network = self.objects[first]
            network.parser = self.new(kind, network=network, errors=[], weights={}, model=None)
            return int(network.parser)
        if kind == "refitter":
            return self.new(kind, engine=self.objects[first], logger=second, new={})
        return self.new(kind, logger=first)

    # the builder

    def builder_network(self, builder: Any, flags: int) -> int:
        return self.new("network", logger=builder.logger, flags=flags, model=None, refittable=set())

    def builder_config(self, builder: Any) -> int:
        return self.new("config", flags={int(self.trt.BuilderFlag.TF32)}, profiles=[], cache=None)

    def builder_profile(self, builder: Any) -> int:
        return self.new("profile", shapes={})

    def builder_build(self, builder: Any, network: int, config: int) -> int:
        n, c = self.objects[network], self.objects[config]
        dynamic = {i.name for i in inputs_of(n.model) if -1 in shape_of(i)}
        if self.fails == "build" or any(dynamic - p.shapes.keys() for p in c.profiles) or (dynamic and not c.profiles):
            self.log(builder.logger, "Error Code 10: Could not find any implementation for node {ForeignNode[x]}.")
            return 0
        strips = int(self.trt.BuilderFlag.STRIP_PLAN) in c.flags
        external = {w.name: w for w in n.model.graph.initializer if w.external_data}
        assert strips and n.refittable == external.keys(), "these tests know stripped plans only"
        plan = {
            "version": self.trt.__version__,
            "model": base64.b64encode(n.model.SerializeToString()).decode(),
            "weights": {name: [TYPES[w.data_type], int(np.prod(w.dims))] for name, w in external.items()},
            "profiles": [p.shapes for p in c.profiles],
            "flags": [name for name, flag in self.trt.BuilderFlag.__members__.items() if int(flag) in c.flags],
        }
        return self.host_memory(b"plan" + json.dumps(plan).encode())

    def host_memory(self, data: bytes) -> int:
        return self.new("memory", at=self.keep(data), length=len(data))

    def memory_data(self, memory: Any) -> int:
        return int(memory.at)

    def memory_size(self, memory: Any) -> int:
        return int(memory.length)

    def memory_type(self, memory: Any) -> int:
        return int(self.trt.DataType.INT8)

    # the parser and its network

    def parser_load(self, parser: Any, data: int, size: int, path: int) -> int:
        parser.model = onnx.ModelProto.FromString(ctypes.string_at(data, size))
        return 1

    def parser_weight(self, parser: Any, name: int, data: int, size: int) -> int:
        weights = {w.name: w for w in parser.model.graph.initializer}
        known = text(name) in weights and size == WIDTHS[TYPES[weights[text(name)].data_type]] * int(
            np.prod(weights[text(name)].dims)
        )
        parser.weights[text(name)] = ctypes.string_at(data, size)
        return int(known)

    def parser_parse(self, parser: Any) -> int:
        model = parser.model
        lacking = [w.name for w in model.graph.initializer if w.external_data and w.name not in parser.weights]
        known = {(function.domain, function.name) for function in model.functions}
        unknown = [n for n in model.graph.node if n.domain and (n.domain, n.op_type) not in known]
        for node in unknown:
            reason = "Plugin not found, are the plugin name, version, and namespace correct?"
            parser.errors.append((node.name, node.op_type, reason))
        parser.errors += [(name, "", "no data") for name in lacking]
        parser.network.model = model
        return int(not parser.errors)

    def parser_errors(self, parser: Any) -> int:
        return len(parser.errors)

    def parser_error(self, parser: Any, number: int) -> int:
        return self.new("error", values=parser.errors[number])

    def error_text(self, error: Any) -> int:
        return self.keep(error.values[2].encode())

    def error_node_name(self, error: Any) -> int:
        return self.keep(error.values[0].encode())

    def error_operator(self, error: Any) -> int:
        return self.keep(error.values[1].encode())

    error_file = error_function = error_text

    def network_layers(self, network: Any) -> int:
        return len(network.model.graph.node)

    def network_layer(self, network: Any, number: int) -> int:
        return self.new("layer", node=network.model.graph.node[number])

    def layer_type(self, layer: Any) -> int:
        return int(self.trt.LayerType.IDENTITY)

    def network_refittable(self, network: Any, name: int) -> int:
        network.refittable.add(text(name))
        return 1

    # settings

    def config_flag(self, config: Any, flag: int) -> int:
        config.flags.add(flag & 0xFFFFFFFF)
        return 1

    def config_clear(self, config: Any, flag: int) -> int:
        config.flags.discard(flag & 0xFFFFFFFF)
        return 1

    def config_add_profile(self, config: Any, profile: int) -> int:
        config.profiles.append(self.objects[profile])
        return len(config.profiles) - 1

    def profile_set(self, profile: Any, name: int, which: int, dims: int) -> int:
        shape = ctypes.cast(dims, ctypes.POINTER(Dims)).contents
        profile.shapes.setdefault(text(name), [None] * 3)[which & 3] = list(shape.sizes[: shape.rank])
        return 1

    def config_cache(self, config: Any, data: int, size: int) -> int:
        return self.new("cache", data=ctypes.string_at(data, size) if size else b"")

    def config_set_cache(self, config: Any, cache: int, ignore: int) -> int:
        config.cache = self.objects[cache]
        return int(config.cache.data in (b"", b"timings"))

    def config_get_cache(self, config: Any) -> int:
        return int(config.cache.address)

    def cache_serialize(self, cache: Any) -> int:
        return self.host_memory(b"timings")

    # the engine

    def runtime_deserialize(self, runtime: Any, data: int, size: int) -> int:
        plan = ctypes.string_at(data, size)
        try:
            read = json.loads(plan.removeprefix(b"plan"))
            model = onnx.ModelProto.FromString(base64.b64decode(read["model"]))
        except ValueError:
            self.log(runtime.logger, "Error Code 1: Serialization (Serialization assertion stdVersionRead failed.)")
            return 0
        if read["version"] != self.trt.__version__:
            self.log(runtime.logger, "Error Code 1: Serialization (Version tag does not match.)")
            return 0
        tensors = {i.name: i for i in (*inputs_of(model), *model.graph.output)}
        return self.new("engine", plan=read, model=model, tensors=tensors, weights={}, budget=None)

    def engine_tensors(self, engine: Any) -> int:
        return len(engine.tensors)

    def engine_tensor(self, engine: Any, number: int) -> int:
        return self.keep(list(engine.tensors)[number].encode())

    def engine_mode(self, engine: Any, name: int) -> int:
        mode = self.trt.TensorIOMode
        return int(mode.OUTPUT if text(name) in [o.name for o in engine.model.graph.output] else mode.INPUT)

    def engine_type(self, engine: Any, name: int) -> int:
        return int(self.trt.DataType.__members__[TYPES[engine.tensors[text(name)].type.tensor_type.elem_type]])

    def engine_profiles(self, engine: Any) -> int:
        return max(1, len(engine.plan["profiles"]))

    def engine_shape(self, engine: Any, result: int, name: int) -> None:
        fill(result, shape_of(engine.tensors[text(name)]))

    def engine_profile_shape(self, engine: Any, result: int, name: int, profile: int, which: int) -> None:
        profiles = engine.plan["profiles"]
        fixed = [shape_of(engine.tensors[text(name)])] * 3
        fill(result, (profiles[profile & 0xFF].get(text(name), fixed) if profiles else fixed)[which & 3])

    def engine_memory(self, engine: Any) -> int:
        return 4096

    def engine_streamable(self, engine: Any) -> int:
        return 1000 if "WEIGHT_STREAMING" in engine.plan["flags"] else 0

    def engine_automatic(self, engine: Any) -> int:
        return 500

    def engine_budget(self, engine: Any, size: int) -> int:
        engine.budget = size
        return 1

    def engine_context(self, engine: Any, strategy: int) -> int:
        return self.new("context", engine=engine, shapes={}, addresses={}, profile=0, scratch=0)

    def engine_inspector(self, engine: Any) -> int:
        return self.new("inspector", engine=engine)

    def inspector_information(self, inspector: Any, form: int) -> int:
        return self.keep(json.dumps(self.layers(inspector.engine)).encode())

    def layers(self, engine: Any) -> dict[str, Any]:
        """The report, in the form of this version."""
        kind = (
            {"Format/Datatype": "Row major linear FP32"} if not self.major else {"Format": "Linear", "Datatype": "FP32"}
        )
        layers = [
            {"Name": n.name or n.op_type, "LayerType": n.op_type, "Outputs": [{"Name": n.output[0], **kind}]}
            for n in engine.model.graph.node
        ]
        names = list(engine.tensors)
        return {"Layers": layers} | (
            {"I/O Tensors": [{"Name": n} for n in names]} if self.major else {"Bindings": names}
        )

    # the refitter

    def names_of(self, names: list[str], size: int, result: int) -> int:
        for i, name in enumerate(names[: size & 0x7FFFFFFF]):
            ctypes.cast(result, ctypes.POINTER(ctypes.c_void_p))[i] = self.keep(name.encode())
        return len(names)

    def refitter_all(self, refitter: Any, size: int, result: int) -> int:
        return self.names_of(sorted(refitter.engine.plan["weights"]), size, result)

    def refitter_missing(self, refitter: Any, size: int, result: int) -> int:
        known = refitter.engine.weights.keys() | refitter.new.keys()
        return self.names_of(sorted(refitter.engine.plan["weights"].keys() - known), size, result)

    def refitter_set(self, refitter: Any, name: int, *rest: int) -> int:
        dtype, values, size = rest[-3:]  # passed by value
        kind, count = refitter.engine.plan["weights"][text(name)]
        if (dtype & 0xFF, size) != (int(self.trt.DataType.__members__[kind]), count):
            self.log(refitter.logger, f"Error Code 3: {text(name)} has {size} values.")
            return 0
        refitter.new[text(name)] = (values, WIDTHS[kind] * count)  # read at the refit, as TensorRT does
        return 1

    refitter_set_at = refitter_set

    def refitter_prototype(self, refitter: Any, result: int, name: int) -> None:
        kind, count = refitter.engine.plan["weights"][text(name)]
        weights = ctypes.cast(result, ctypes.POINTER(Weights)).contents
        weights.type, weights.values, weights.count = int(self.trt.DataType.__members__[kind]), None, count

    def refitter_refit(self, refitter: Any) -> int:
        engine = refitter.engine
        if self.fails == "refit" or engine.plan["weights"].keys() - engine.weights.keys() - refitter.new.keys():
            self.log(refitter.logger, "Error Code 4: the engine is not refitted.")
            return 0
        engine.weights |= {name: ctypes.string_at(*place) for name, place in refitter.new.items()}
        return 1

    def refitter_refit_async(self, refitter: Any, stream: int) -> int:
        return self.refitter_refit(refitter) if stream else 0

    # calls

    def context_engine(self, context: Any) -> int:
        return int(context.engine.address)

    def context_profile(self, context: Any, profile: int, stream: int) -> int:
        context.profile = profile & 0xFF
        return int(bool(stream))

    def context_input(self, context: Any, name: int, dims: int) -> int:
        shape = ctypes.cast(dims, ctypes.POINTER(Dims)).contents
        sizes = list(shape.sizes[: shape.rank])
        profiles = context.engine.plan["profiles"]
        least, _, most = profiles[context.profile].get(text(name), [sizes] * 3) if profiles else [sizes] * 3
        context.shapes[text(name)] = sizes
        return int(all(a <= n <= b for a, n, b in zip(least, sizes, most, strict=True)))

    def context_infer(self, context: Any, size: int, names: int) -> int:
        return 0

    def context_shape(self, context: Any, result: int, name: int) -> None:
        if text(name) in context.shapes:
            return fill(result, context.shapes[text(name)])
        zeros = {n: np.zeros(s, self.numpy(context, n)) for n, s in context.shapes.items()}
        return fill(result, list(self.results(context, zeros)[text(name)].shape))

    def numpy(self, context: Any, name: str) -> Any:
        return onnx.helper.tensor_dtype_to_np_dtype(context.engine.tensors[name].type.tensor_type.elem_type)

    def context_update(self, context: Any) -> int:
        return 4096

    def context_memory(self, context: Any, address: int, size: int) -> int:
        context.scratch = size if address and not address % 256 else 0
        return 1

    def context_address(self, context: Any, name: int, address: int) -> int:
        context.addresses[text(name)] = address
        return int(not address % 256)

    def context_run(self, context: Any, stream: int) -> int:
        if self.fails == "run" or context.scratch < 4096 or not stream:
            return 0
        if self.driver.stub_capturing():
            self.captured.append(context)
            return 1
        self.compute(context)
        return 1

    def _replay(self) -> None:
        self.compute(self.captured[-1])

    def compute(self, context: Any) -> None:
        feed = {}
        for name, shape in context.shapes.items():
            kind = np.dtype(self.numpy(context, name))
            data = ctypes.string_at(context.addresses[name], kind.itemsize * int(np.prod(shape)))
            feed[name] = np.frombuffer(data, kind).reshape(shape)
        for name, value in self.results(context, feed).items():
            data = np.ascontiguousarray(value).tobytes()
            ctypes.memmove(context.addresses[name], data, len(data))

    def results(self, context: Any, feed: dict[str, Any]) -> dict[str, Any]:
        """The graph in ONNX's reference evaluator, with the weights of the refit."""
        engine, model = context.engine, onnx.ModelProto()
        model.CopyFrom(engine.model)
        for weight in model.graph.initializer:
            if weight.external_data:
                size = WIDTHS[TYPES[weight.data_type]] * int(np.prod(weight.dims))
                weight.raw_data = engine.weights.get(weight.name, bytes(size))
                del weight.external_data[:]
                weight.data_location = onnx.TensorProto.DEFAULT
        names = [o.name for o in model.graph.output]
        return dict(zip(names, ReferenceEvaluator(model).run(names, feed), strict=True))


def inputs_of(model: Any) -> list[Any]:
    weights = {w.name for w in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in weights]


def shape_of(value: Any) -> list[int]:
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]


def fill(result: int, shape: list[int]) -> None:
    dims = ctypes.cast(result, ctypes.POINTER(Dims)).contents
    dims.rank = len(shape)
    for i, size in enumerate(shape):
        dims.sizes[i] = size
