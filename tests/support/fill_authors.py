"""The layouts of the models' authors: the names and shapes of flux1-fill-dev.safetensors and ae.safetensors."""

__all__ = ["authors_transformer", "authors_vae"]

Shapes = dict[str, tuple[int, ...]]


def authors_transformer(dim: int, double: int, single: int) -> Shapes:
    """flux1-fill-dev.safetensors."""
    shapes: Shapes = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    linear("img_in", dim, 384)
    linear("txt_in", dim, 4096)
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", dim, width)
        linear(f"{name}.out_layer", dim, dim)
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * dim, dim)
            linear(f"{block}_attn.qkv", 3 * dim, dim)
            linear(f"{block}_attn.proj", dim, dim)
            linear(f"{block}_mlp.0", 4 * dim, dim)
            linear(f"{block}_mlp.2", dim, 4 * dim)
            shapes |= {f"{block}_attn.norm.{of}_norm.scale": (128,) for of in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * dim, dim)
        linear(f"{block}.linear1", 7 * dim, dim)
        linear(f"{block}.linear2", dim, 5 * dim)
        shapes |= {f"{block}.norm.{of}_norm.scale": (128,) for of in ("query", "key")}
    linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    linear("final_layer.linear", 64, dim)
    return shapes


def authors_vae(widths: tuple[int, ...] = (128, 256, 512, 512), latent: int = 16) -> Shapes:
    """ae.safetensors: blocks are counted from the picture inwards, in the decoder too."""
    shapes: Shapes = {}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def conv(name: str, out: int, into: int, side: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def block(name: str, out: int, into: int) -> None:
        for i, width in ((1, into), (2, out)):
            norm(f"{name}.norm{i}", width)
            conv(f"{name}.conv{i}", out, width)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name: str) -> None:
        block(f"{name}.block_1", widths[-1], widths[-1])
        norm(f"{name}.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", widths[-1], widths[-1], 1)
        block(f"{name}.block_2", widths[-1], widths[-1])

    levels = range(len(widths))
    conv("encoder.conv_in", widths[0], 3)
    for i in levels:
        for j in range(2):
            block(f"encoder.down.{i}.block.{j}", widths[i], widths[i] if j else widths[max(0, i - 1)])
        if i < levels[-1]:
            conv(f"encoder.down.{i}.downsample.conv", widths[i], widths[i])
    middle("encoder.mid")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", 2 * latent, widths[-1])
    conv("decoder.conv_in", widths[-1], latent)
    middle("decoder.mid")
    for i in levels:
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", widths[i], widths[i] if j else widths[min(i + 1, levels[-1])])
        if i:
            conv(f"decoder.up.{i}.upsample.conv", widths[i], widths[i])
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0])
    return shapes
