"""A GPU as a device. Values stay in its memory until another device reads them, or the host joins tiles.

It has run only over a driver of tests, and never on a GPU.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tilewright.runtime.engines import Engine
from tilewright.runtime.engines.driver import Gpu, Tensor
from tilewright.runtime.execute.devices import OpenEngines

__all__ = ["CudaDevice"]


class CudaDevice:
    """A GPU that runs engines with a method `run_on`, whose outputs stay there."""

    def __init__(self, name: str, engines: Mapping[str, Engine], gpu: Gpu) -> None:
        self.name, self.engines, self.gpu = name, engines, gpu

    def put(self, array: Any) -> Tensor:
        """A copy of an array in the memory of the GPU."""
        with self.gpu:
            tensor = Tensor(self.gpu, array.shape, array.dtype, holder=self)
            self.gpu.fill(tensor.address, array)
            self.gpu.wait()  # until then the array must stay
        return tensor

    def get(self, buffer: Tensor) -> Any:
        """The numbers of a tensor."""
        return buffer.array()

    def finite(self, buffer: Tensor) -> bool:
        """Whether all numbers are finite. The host looks at them, because the driver computes nothing."""
        return buffer.dtype.kind != "f" or bool(np.isfinite(self.get(buffer)).all())

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component's engine."""
        engine: Any = self.engines[component]
        tensors: dict[str, Tensor] = engine.run_on(inputs, outputs)
        for tensor in tensors.values():
            tensor.holder = self
        return dict(tensors)

    def close(self, components: Iterable[str] | None = None) -> None:
        """Close engines. No call may be using them."""
        if isinstance(self.engines, OpenEngines):
            self.engines.close(self.engines if components is None else components)
