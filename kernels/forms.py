"""The plugins of TensorRT by name, without TensorRT: each stands for an op with the inputs that systems give it.

TensorRT chooses a plugin by its name alone, and a plugin's inputs are fixed. So an op with optional inputs has one
plugin for each form that systems use, named like the node: `QkvNormRope_without_c`.
"""

from tilewright.kernels.face import Face, plain
from tilewright.kernels.table import KERNELS, Op

__all__ = ["PLUGINS", "TABLES", "forms"]

# op -> for each form that systems use, the inputs that it leaves out
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "concat_project": ((),),
    "qkv_norm_rope": (("c",), ("c", "cos", "sin"), ("c", "hq", "hk", "hv", "norm_q", "norm_k")),
    "joint_attention": ((),),
    "codebook_nearest": ((),),
    "codebook_from_logits": ((),),
    "codebook_from_hidden": ((),),
}
TABLES = ("cos", "sin")  # these inputs are float32 or of the network's type


def forms() -> dict[str, tuple[Op, Face, tuple[str, ...]]]:
    """Name of a plugin -> its op, the op's face, and its inputs in order."""
    named = {}
    for op in map(KERNELS.__getitem__, FORMS):
        assert op.face is not None
        for missing in FORMS[op.name]:
            inputs = tuple(name for name in plain(op.face.inputs) if name not in missing)
            named[op.face.node_name(inputs)] = op, op.face, inputs
    return named


PLUGINS = {name: inputs for name, (_, _, inputs) in forms().items()}
