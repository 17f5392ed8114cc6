"""Eager networks that look at the tensors that `WatchedEngine` looks at.

A tensor inside a graph is found by the weights that it is multiplied by. The inputs of attention are found by their
place: the second attention of the network is that of the graph. Tensors that meet a table of constants are not seen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.calib.observe.pieces import OURS_MULTIPLY, multiplied_by, observed_tensors
from tilewright.export.graph.ops import node_names
from tilewright.export.verify.eager import eager_network
from tilewright.runtime.bundle.read import Bundle

__all__ = ["EagerEngine"]

Look = Callable[[str, Any, int | None], None]
OURS = node_names()
PRODUCTS = {  # op of PyTorch -> the places of its two factors
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.convolution.default: (0, 1),
}
ATTENTIONS = ("Attention", "JointAttention")
ATTENTION = "_scaled_dot_product"  # PyTorch's ops begin so


class EagerEngine:
    """An eager network that hands each tensor that it recognises to `look`."""

    def __init__(self, bundle: Bundle, component: str, weights_dir: Path | None, look: Look) -> None:
        graph = onnx.load(bundle.path(bundle.manifest.components[component].graph), load_external_data=False).graph
        self.eager, self.look = eager_network(bundle, component, weights_dir), look
        self.observed, self.multiplied = observed_tensors(graph), multiplied_by(graph)
        nodes = [node for node in graph.node if node.op_type in ATTENTIONS]
        self.attentions = [[*node.input[: OURS_MULTIPLY.get(node.op_type, (3, None))[0]]] for node in nodes]
        self.weights = {tensor.data_ptr(): name for name, tensor in self.eager.network.state_dict().items()}

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        with _Watching(self):
            return self.eager.run(inputs, outputs)

    def close(self) -> None:
        """Free the memory."""
        self.eager.network = None
        self.weights.clear()


class _Watching(TorchDispatchMode):
    """Sees every op of one call."""

    def __init__(self, engine: EagerEngine) -> None:
        super().__init__()
        self.engine, self.seen, self.attentions = engine, set[str](), iter(engine.attentions)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, tensor in self._entering(op, args):
            if name in self.engine.observed and name not in self.seen:
                self.seen.add(name)
                self.engine.look(name, tensor.detach().float().cpu().numpy(), self.engine.observed[name])
        return op(*args, **(kwargs or {}))

    def _entering(self, op: Any, args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the graph that an op multiplies, by their names there."""
        ours = OURS.get(op)
        if op.name().removeprefix("aten::").startswith(ATTENTION) or ours in ATTENTIONS:
            names = next(self.attentions)
            yield from zip(names, args[: len(names)], strict=True)
            return
        if ours is None:
            factors = [args[place] for place in PRODUCTS.get(op, ())]
        else:
            factors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        weights = [name for arg in factors if (name := self.engine.weights.get(arg.data_ptr()))]
        others = [arg for arg in factors if arg.data_ptr() not in self.engine.weights]
        count = 1 if ours is None else OURS_MULTIPLY.get(ours, (0, None))[0]
        for place, tensor in enumerate(others[:count] if weights else ()):
            names = self.engine.multiplied.get((weights[0], place), [])
            yield from [(name, tensor) for name in names if name not in self.seen][:1]
