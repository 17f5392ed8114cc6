"""FLUX's key names against the libraries' own: diffusers' state dicts and converters, transformers' loaders."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from support.fill_authors import authors_transformer, authors_vae
from tilewright.export.graph.trace import parameter_specs
from tilewright.export.system import ComponentSpec, Preset, Tensors, UserFiles
from tilewright.export.systems.flux.in_token import SYSTEM as IN_TOKEN
from tilewright.export.systems.flux.keys import ORIGIN_OF_COMPONENT, ignored, keys, named_by_diffusers
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.systems.flux.vicr import SYSTEM as VICR
from tilewright.export.weights.files import find, open_reference, reference_parameters, resolve
from tilewright.export.weights.lora import as_parameters
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError

HALVES = ("step", "modulate"), ("encode", "decode")
KINDS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
NETWORKS = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
Shapes = dict[str, tuple[int, ...]]


@cache
def sources(preset: str, *, split: bool = True, name: str = "in-token") -> dict[str, ComponentSpec]:
    system, options = {s.name: s for s in (IN_TOKEN, VICR)}[name], {"no_split_modulation": not split}
    return system.components(system.decide(Preset(preset, PRESETS[preset], True), options, UserFiles({}, {})))


@cache
def ours(preset: str, component: str, *, split: bool = True) -> Shapes:
    """The parameters of one of our networks."""
    specs = parameter_specs(sources(preset, split=split)[component])
    return {name: tuple(int(d) for d in spec.shape) for name, spec in specs.items()}


@cache
def theirs(preset: str, network: str) -> Shapes:
    """The tensors of diffusers' network."""
    with torch.device("meta"):
        made = NETWORKS[network](**getattr(PRESETS[preset], network))
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("components", [*HALVES, ("step",)], ids=" and ".join)
@pytest.mark.parametrize(("preset", "counts"), [("tiny", None), ("full", {"transformer": 1160, "vae": 244})])
def test_the_first_names_are_diffusers_own_each_tensor_exactly_once(preset, counts, components):
    network = ORIGIN_OF_COMPONENT[components[0]]
    split = len(components) == 2  # the step that makes its modulation itself holds all of the transformer
    published = theirs(preset, network)
    if counts:
        assert len(published) == counts[network]
    taken: Counter = Counter()
    for component in components:
        for parameter, shape in ours(preset, component, split=split).items():
            name = keys(component, parameter)[0]
            whole = published[name if isinstance(name, str) else name.key]
            if isinstance(name, str):
                assert shape == whole
                taken.update([(name, 0), (name, 1)])
            else:  # half of the rows
                assert (name.parts, name.stop - name.start) == (2, 1)
                assert shape == (whole[0] // 2, *whole[1:])
                taken[name.key, name.start] += 1
    assert taken == {(name, half): 1 for name in published for half in (0, 1)}


def filled(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def content(found: Tensors, reference: Reference, dtype: torch.dtype) -> Tensor:
    """The bytes of a reference, read from its file."""
    data = torch.from_numpy(open_reference(found.folder, reference, "c"))
    return data.view(dtype).reshape(reference.shape)


def assert_reads(found: Tensors, component: str, parameter: str, expected: Tensor) -> Reference:
    """The file's bytes under a parameter's names are this tensor, and lie within one of the file's tensors."""
    reference = resolve(found, keys(component, parameter))
    assert reference is not None, parameter
    assert reference.dtype == str(expected.dtype).removeprefix("torch.")
    assert reference.length == expected.numel() * expected.element_size()
    assert any(
        whole.offset <= reference.offset and reference.offset + reference.length <= whole.offset + whole.length
        for whole in found.tensors.values()
        if whole.file == reference.file
    )
    assert reference.offset + reference.length <= (found.folder / reference.file).stat().st_size
    read = content(found, reference, expected.dtype)
    assert torch.equal(read.reshape(expected.shape), expected), parameter
    return reference


def assert_covered(found: Tensors, references: list[Reference]) -> None:
    """Together they are every byte of the files' tensors, none of them twice."""
    files = {r.file for r in found.tensors.values()}
    for file in files:
        end = min(r.offset for r in found.tensors.values() if r.file == file)
        for r in sorted((r for r in references if r.file == file), key=lambda r: r.offset):
            assert r.offset == end
            end += r.length
        assert end == max(r.offset + r.length for r in found.tensors.values() if r.file == file)


def last_halves(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A parameter's tensor by diffusers' names: of the last modulation, scale comes first, then shift."""
    for half, part in (("scale", 0), ("shift", 1)):
        whole = name.replace(f"norm_out.linear.{half}.", "norm_out.linear.")
        if whole != name:
            return tensors[whole].chunk(2)[part]
    return tensors[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("components", HALVES, ids=" and ".join)
def test_of_diffusers_files_each_parameter_is_its_tensor(tmp_path, components, dtype):
    tensors = filled(theirs("tiny", ORIGIN_OF_COMPONENT[components[0]]), dtype)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    found, references = find(tmp_path), []
    for component in components:
        for parameter in ours("tiny", component):
            expected = last_halves(parameter.removeprefix("transformer."), tensors)
            references.append(assert_reads(found, component, parameter, expected))
    assert_covered(found, references)


# the authors' layouts; what the networks are is told by systems.md 1.2, 1.3 and 1.7


def converted(network: str, tensors: Mapping[str, Tensor], vae: Mapping[str, Any] = PRESETS["full"].vae) -> dict:
    """What diffusers makes of the authors' layout."""
    given = dict(tensors)
    if network == "vae":
        return convert_ldm_vae_checkpoint(given, vae)
    made = convert_flux_transformer_checkpoint_to_diffusers(given)
    assert not given  # it takes what it knows
    return made


AUTHORS: dict[str, Callable[[], Shapes]] = {
    "transformer": lambda: authors_transformer(3072, 19, 38),
    "vae": authors_vae,
}


def as_file(shapes: Shapes) -> Tensors:
    """A file of bfloat16 tensors of which there is only the header."""
    tensors, end = {}, 1000
    for name, shape in shapes.items():
        tensors[name] = Reference("it.safetensors", "bfloat16", shape, end, 2 * math.prod(shape))
        end += 2 * math.prod(shape)
    return Tensors(Path("/nowhere"), tensors, {"it.safetensors": "it"})


@pytest.mark.slow
@pytest.mark.parametrize("components", HALVES, ids=" and ".join)
def test_of_the_authors_full_files_every_byte_is_some_parameters(components):
    """Both layouts at full size, without a file; the authors' is one that diffusers' converter takes for FLUX's."""
    network = ORIGIN_OF_COMPONENT[components[0]]
    authors = AUTHORS[network]()
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in authors.items()}
    assert {name: tuple(t.shape) for name, t in converted(network, on_meta).items()} == theirs("full", network)
    wanted = {component: ours("full", component) for component in components}
    for layout in (authors, theirs("full", network)):
        found = as_file(layout)
        attached = reference_parameters(wanted, {network: IN_TOKEN.origins[network].rename(found)}, IN_TOKEN)
        references = [r for of in attached.values() for r in of.values()]
        assert len(references) == sum(map(len, wanted.values()))
        assert_covered(found, references)
        for component, shapes in wanted.items():
            assert {name: r.shape for name, r in attached[component].items()} == shapes


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As many rows, but few columns: the converter knows the published numbers of rows by heart."""
    return (shape[0], *(min(d, 2) for d in shape[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_authors_transformer_each_parameter_is_what_diffusers_converts_it_to(tmp_path, dtype):
    authors = {name: small(shape) for name, shape in authors_transformer(3072, 2, 2).items()}
    tensors = filled(authors, dtype)
    save_file(tensors, tmp_path / "flux1-fill-dev.safetensors")
    expected, found, references = converted("transformer", tensors), find(tmp_path), []
    assert expected.keys() == theirs("tiny", "transformer").keys()  # two blocks of each kind, as well
    for component in ("step", "modulate"):
        for parameter in ours("tiny", component):
            tensor = last_halves(parameter.removeprefix("transformer."), expected)
            references.append(assert_reads(found, component, parameter, tensor))
    assert_covered(found, references)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_authors_vae_each_parameter_is_what_diffusers_converts_it_to(tmp_path, dtype):
    tensors = filled(authors_vae((4, 6, 8, 8), latent=2), dtype)
    save_file(tensors, tmp_path / "ae.safetensors")
    expected, found, references = converted("vae", tensors), named_by_diffusers(find(tmp_path)), []
    assert expected.keys() == theirs("full", "vae").keys()
    for component in ("encode", "decode"):
        for parameter in ours("full", component):
            references.append(assert_reads(found, component, parameter, expected[parameter]))
    assert_covered(found, references)


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8), (4, 6, 8, 8, 10)], ids=len)
def test_of_any_number_of_blocks_the_authors_vae_has_diffusers_names(tmp_path, widths):
    tensors = filled(authors_vae(widths, latent=2), torch.float32)
    save_file(tensors, tmp_path / "ae.safetensors")
    of_blocks = {name: [kind] * len(widths) for name, kind in KINDS.items()}
    expected, found = converted("vae", tensors, PRESETS["full"].vae | of_blocks), named_by_diffusers(find(tmp_path))
    assert found.tensors.keys() == expected.keys()
    for name, reference in found.tensors.items():
        assert torch.equal(content(found, reference, torch.float32).reshape(expected[name].shape), expected[name])


def test_no_other_names_are_found_in_either_layout():
    """A parameter's names lead to one tensor in each layout, so that the order of trying does not matter."""
    for components in HALVES:
        network = ORIGIN_OF_COMPONENT[components[0]]
        for layout in (AUTHORS[network](), theirs("full", network)):
            layout = IN_TOKEN.origins[network].rename(as_file(layout)).tensors
            for component in components:
                for parameter in ours("full", component):
                    names = {n if isinstance(n, str) else n.key for n in keys(component, parameter)}
                    assert len(names & layout.keys()) == 1, parameter


def test_a_tensor_that_fill_does_not_have_is_refused():
    for network, components in zip(NETWORKS, HALVES, strict=True):
        wanted = {component: ours("full", component) for component in components}
        with pytest.raises(InputError, match=r"holds unexpected 1 tensors: quant_conv\.weight"):
            found = as_file(AUTHORS[network]() | {"quant_conv.weight": (32, 32, 1, 1)})
            reference_parameters(wanted, {network: IN_TOKEN.origins[network].rename(found)}, IN_TOKEN)


# low-rank branches


@pytest.mark.parametrize("layout", ["diffusers", "authors"])
def test_every_linear_that_a_branch_may_be_for_is_found_by_its_modules_name(layout):
    """Whole, as what a branch adds is whole: the last modulation too, which in our networks is two linears."""
    published = theirs("full", "transformer")
    found = as_file(published if layout == "diffusers" else AUTHORS["transformer"]())
    linears = {name: shape for name, shape in published.items() if name.endswith(".weight") and len(shape) == 2}
    assert len(linears) == (1160 - 152) // 2
    for name, shape in linears.items():
        reference = resolve(found, keys("step", f"transformer.{name}"))
        assert reference is not None and reference.shape == shape, name


def test_a_branch_is_named_by_its_module_and_the_last_modulations_is_shared(tmp_path):
    pair = {"lora_A": torch.arange(6.0).reshape(2, 3), "lora_B": torch.arange(16.0).reshape(8, 2)}
    modules = ("norm_out.linear", "transformer_blocks.1.attn.to_out.0")
    file = {f"transformer.{m}.{which}.weight": t + i for i, m in enumerate(modules) for which, t in pair.items()}
    save_file(file, tmp_path / "lora.safetensors")
    found = as_parameters(find(tmp_path))
    for component in ("step", "modulate"):
        for half, rows in (("scale", slice(0, 4)), ("shift", slice(4, 8))):
            module = f"transformer.norm_out.linear.{half}"
            assert_reads(found, component, f"{module}.lora_A", pair["lora_A"])
            assert_reads(found, component, f"{module}.lora_B", pair["lora_B"][rows])
        for which, tensor in pair.items():
            assert_reads(found, component, f"transformer.transformer_blocks.1.attn.to_out.0.{which}", tensor + 1)


# the encoders' files, as transformers reads them


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


SIZES = PRESETS["tiny"]
TEXT = SIZES.clip_text | {"projection_dim": 16, "bos_token_id": 0, "eos_token_id": 2}
SIGLIP_TEXT = {k: v for k, v in TEXT.items() if k != "projection_dim"}
# component -> system, origin, what is published, the part that is read, and how files of that part alone are spelt
ENCODERS = {
    "clip": (
        VICR,
        "text_encoder",
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES.clip_vision, projection_dim=16)),
        CLIPTextModel,
        "text_model.",
    ),
    "t5": (VICR, "text_encoder_2", lambda: T5ForConditionalGeneration(T5Config(**SIZES.t5)), T5EncoderModel, ""),
    "see": (
        IN_TOKEN,
        "image_encoder",
        lambda: SiglipModel(SiglipConfig(text_config=SIGLIP_TEXT, vision_config=SIZES.siglip)),
        SiglipVisionModel,
        "vision_model.",
    ),
    "see of VICR": (
        VICR,
        "image_encoder",
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES.clip_vision, projection_dim=16)),
        CLIPVisionModelWithProjection,
        "",
    ),
}


def of_encoder(name: str) -> tuple[str, Shapes]:
    """The component, and the parameters of its network."""
    component, system = name.split()[0], ENCODERS[name][0]
    source = sources("tiny", name=system.name)[component]
    return component, {n: tuple(int(d) for d in s.shape) for n, s in parameter_specs(source).items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_read_from_the_whole_models_file_as_transformers_reads_it(tmp_path, name):
    """The file holds another tower, heads, tied copies and counters too: all that is not read is to be ignored."""
    system, origin, whole, part, _ = ENCODERS[name]
    published = whole()
    published.save_pretrained(tmp_path / "saved")
    expected = part.from_pretrained(tmp_path / "saved").state_dict()
    held = {key: tensor.clone() for key, tensor in published.state_dict().items()}  # ties as copies
    for tower in ("text_model", "vision_model"):
        if any(key.startswith(tower) for key in held):  # as versions before 4.31 wrote
            held[f"{tower}.embeddings.position_ids"] = torch.arange(9)[None]
    (tmp_path / "file").mkdir()
    save_file(held, tmp_path / "file" / "model.safetensors")
    found = find(tmp_path / "file")
    component, shapes = of_encoder(name)
    attached = reference_parameters({component: shapes}, {origin: found}, system)[component]
    assert shapes.keys() <= {f"model.{key}" for key in expected}
    for parameter, reference in attached.items():
        assert torch.equal(content(found, reference, torch.float32), expected[parameter.removeprefix("model.")])
    assert len(held) > len(shapes)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_first_name_is_the_published_one_and_the_classs_own_is_read_too(tmp_path, name):
    """transformers writes what it has read from a published file in the published spelling, else in the class's own."""
    _, _, whole, part, prefix = ENCODERS[name]
    component, shapes = of_encoder(name)
    whole().save_pretrained(tmp_path / "whole")
    network = part.from_pretrained(tmp_path / "whole")
    network.save_pretrained(tmp_path / "published")
    save_file({key: tensor.clone() for key, tensor in network.state_dict().items()}, tmp_path / "own.safetensors")
    published, own = find(tmp_path / "published"), find(tmp_path / "own.safetensors")
    for parameter in shapes:
        plain = parameter.removeprefix("model.")
        expected = network.state_dict()[plain]
        assert keys(component, parameter)[0] == prefix + plain
        assert prefix + plain in published.tensors
        for found in (published, own):
            assert_reads(found, component, parameter, expected)


@pytest.mark.parametrize(
    ("origin", "key", "expected"),
    [
        ("text_encoder", "text_model.embeddings.position_ids", True),
        ("text_encoder", "vision_model.post_layernorm.weight", True),
        ("text_encoder", "visual_projection.weight", True),
        ("text_encoder", "text_projection.weight", True),
        ("text_encoder", "logit_scale", True),
        ("text_encoder", "text_model.final_layer_norm.weight", False),
        ("text_encoder", "embeddings.token_embedding.weight", False),
        ("text_encoder_2", "encoder.embed_tokens.weight", True),
        ("text_encoder_2", "decoder.final_layer_norm.weight", True),
        ("text_encoder_2", "lm_head.weight", True),
        ("text_encoder_2", "shared.weight", False),
        ("text_encoder_2", "encoder.final_layer_norm.weight", False),
        ("image_encoder", "vision_model.head.probe", True),
        ("image_encoder", "head.probe", True),
        ("image_encoder", "text_model.head.weight", True),
        ("image_encoder", "logit_bias", True),
        ("image_encoder", "text_projection.weight", True),
        ("image_encoder", "vision_model.post_layernorm.bias", False),
        ("image_encoder", "visual_projection.weight", False),
        ("image_embedder", "redux_up.weight", False),
        ("transformer", "x_embedder.weight", False),
        ("transformer", "decoder.conv_in.weight", False),
        ("vae", "decoder.conv_in.weight", False),
        ("vae", "quant_conv.weight", False),
        ("lora", "transformer.x_embedder.diff", False),
    ],
)
def test_only_what_published_files_hold_besides_is_ignored(origin, key, expected):
    assert ignored(origin, key) is expected
    assert IN_TOKEN.ignored(origin, key) is VICR.ignored(origin, key) is expected
