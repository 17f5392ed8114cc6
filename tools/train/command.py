"""Running a training as a command, and writing its weights."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["main", "write"]

Files = dict[str, dict[str, Tensor] | str]  # name -> text, or name without its ending -> tensors


class Training(Protocol):
    def run(self) -> None: ...

    def files(self) -> Files: ...


def main(description: str, training: Callable[[Path], Training]) -> int:
    """Train, from the last saved state if there is one, and write the weights."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of saved states; training continues from there")
    parser.add_argument("out", type=Path, help="the folder of weights")
    arguments = parser.parse_args()
    trained = training(arguments.folder)
    trained.run()
    write(trained.files(), arguments.out)
    return 0


def write(files: Files, folder: Path) -> None:
    """Write tensors as float16, and texts unchanged."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            halves = {key: tensor.half().contiguous() for key, tensor in content.items()}
            save_file(halves, path.with_name(f"{path.name}.safetensors"))
