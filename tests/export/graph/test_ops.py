"""Our ops in ONNX: every form of every function, in ONNX Runtime, against the op's reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tilewright.export.graph.ops import function, translations
from tilewright.kernels.face import plain
from tilewright.kernels.table import KERNELS
from tilewright.runtime.errors import BuildError

FORMS = {  # op -> what is left out
    "concat_project": [(), ("c",)],
    "qkv_norm_rope": [
        (),
        ("c",),
        ("c", "cos", "sin"),
        ("c", "norm_q", "norm_k"),
        ("c", "hq", "hk", "hv", "norm_q", "norm_k"),
    ],
    "joint_attention": [()],
    "codebook_nearest": [()],
    "codebook_from_logits": [()],
    "codebook_from_hidden": [(), ("bias",)],
}
OPTIONS = {"qkv_norm_rope": {"heads": 3, "epsilon": 1e-4, "interleaved": True}}


def arguments(name: str) -> dict[str, torch.Tensor]:
    """All inputs of a face, those of HiTokSR and FLUX alike."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "qkv_norm_rope":
        weights = {f"w{p}": made(48, 17) for p in "qkv"} | {f"h{p}": made(48) for p in "qkv"}
        norms = {"norm_q": made(16), "norm_k": made(16)}
        return {"x": made(2, 9, 12), "c": made(2, 9, 5)} | weights | norms | {"cos": made(6, 8), "sin": made(6, 8)}
    call, _ = KERNELS[name].cases["small"](made)
    face = KERNELS[name].face
    assert face is not None
    return dict(zip(plain(face.inputs), call, strict=True))


@pytest.mark.parametrize(("name", "missing"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_the_function_gives_what_the_reference_gives(name: str, missing: tuple[str, ...]) -> None:
    op, given = KERNELS[name], {k: v for k, v in arguments(name).items() if k not in missing}
    options = OPTIONS.get(name, {})
    if "c" in missing and name == "qkv_norm_rope":
        given |= {f"w{p}": given[f"w{p}"][:, :12].contiguous() for p in "qkv"}
    face = op.face
    assert face is not None
    body = function(face, frozenset(given), 23)
    attributes = {key: int(v) if isinstance(v, bool) else v for key, v in options.items()}
    names = [key for key in plain(face.inputs) if key in given]
    node = onnx.helper.make_node(body.name, names, plain(face.outputs), domain="tilewright", **attributes)
    inputs = [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v.shape) for k, v in given.items()]
    kinds = {"indices": onnx.TensorProto.INT32}
    outputs = [
        onnx.helper.make_tensor_value_info(k, kinds.get(k, onnx.TensorProto.FLOAT), None) for k in plain(face.outputs)
    ]
    imports = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("tilewright", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs, outputs), functions=[body], opset_imports=imports, ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {k: v.numpy() for k, v in given.items()})
    expected = op.reference(**dict.fromkeys(plain(face.inputs)) | given, **options)
    for ours, theirs in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-5)


def test_what_has_no_onnx_form_is_refused_by_name() -> None:
    translate = translations()[torch.ops.tilewright.concat_project.default]
    with pytest.raises(BuildError, match="with scale has no ONNX form"):
        translate("x", "c", "weight", "h", "scale")
