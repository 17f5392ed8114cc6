"""A training as a command: where it notes how far it is, and where the weights go."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["main", "write"]

Files = dict[str, dict[str, Tensor] | str]  # texts by their names, tensors by names without an ending


class Training(Protocol):
    def run(self) -> None: ...

    def files(self) -> Files: ...


def main(description: str, training: Callable[[Path], Training]) -> int:
    """Train, or go on, and write the weights."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where it notes how far it is")
    parser.add_argument("out", type=Path, help="the folder of weights")
    asked = parser.parse_args()
    made = training(asked.folder)
    made.run()
    write(made.files(), asked.out)
    return 0


def write(files: Files, folder: Path) -> None:
    """Tensors as float16, texts as they are."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            halves = {key: tensor.half().contiguous() for key, tensor in content.items()}
            save_file(halves, path.with_name(f"{path.name}.safetensors"))
