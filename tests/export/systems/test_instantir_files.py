"""InstantIR's published files: every name and spelling, the sizes they tell, one UNet on the disk, what is refused."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support import instantir_reference as upstream
from support.instantir_files import FILES, SDXL, write_folder
from support.programs import assert_stored
from tilewright.cli.main import main
from tilewright.export.build.request import Request
from tilewright.export.build.stages.attach import stage
from tilewright.export.graph.trace import parameter_specs
from tilewright.export.system import Preset, Settings, Tensors, UserFiles
from tilewright.export.systems.instantir.sizes import PRESETS
from tilewright.export.systems.instantir.system import LORA, SYSTEM
from tilewright.export.weights.files import find, reference_parameters
from tilewright.export.weights.lora import lora_of
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.bundle.weights import Reference, Weights
from tilewright.runtime.engines import Opening
from tilewright.runtime.engines.ort import open_engine
from tilewright.runtime.restore import load

pytestmark = pytest.mark.slow

OWN = ("adapter", "aggregator", "previewer")
UNREAD = {"text_encoder": 18, "dino": 1}  # its last layer and norm; the mask token
IN_LORA = "encoder_hid_proj.image_projection_layers.0."
LAYOUT = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
SPELLINGS = {  # of other versions of the libraries
    "adapter": LAYOUT,
    "vae": {"s.0.to_q.": "s.0.query.", "s.0.to_k.": "s.0.key.", "s.0.to_v.": "s.0.value.", "to_out.0": "proj_attn"},
    "dino": {f".attention.attention.{name}.": f".attention.{name[0]}_proj." for name in ("query", "key", "value")}
    | {".attention.output.dense.": ".attention.o_proj."},
    "text_encoder": {"text_model.": ""},
}
Nested = dict[str, Any]


@remembered
def tensors() -> Nested:
    """Tiny random tensors under the published names; do not change them."""
    return upstream.make_files(upstream.TINY, 3)


@remembered
def shapes_of(preset: str) -> Nested:
    """Origin -> the shapes that its published file holds."""
    shapes = upstream.file_shapes(getattr(upstream, preset.upper()))
    return shapes | {"adapter": flat(shapes["adapter"])}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers spend their time waiting for a second thread, seconds at a time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny files as a user has them; do not change them."""
    return write_folder(tmp_path_factory.mktemp("instantir"), upstream.TINY, tensors())


@pytest.fixture
def mine(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files to spoil; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(published, tmp_path / "files")


def given(root: Path, **changed: Any) -> dict[str, str]:
    """The arguments that name these files; one that is None is left out."""
    files = {"weights": SDXL, "dino": "dinov2-large"} | {name: FILES[name] for name in OWN}
    return {name: str(root / file) for name, file in (files | changed).items() if file}


def words(root: Path, out: Path, *more: str, **changed: Any) -> list[str]:
    """The command that builds from these files."""
    named = [word for name, file in given(root, **changed).items() for word in (f"--{name}", file)]
    fixed = ["--preset", "tiny", "--verify", "never", "--resampler-heads", "2"]
    return ["export", "build", "instantir", *fixed, *named, *more, "-o", str(out)]


@pytest.fixture(scope="module")
def bundle(cache: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the published files; do not change it."""
    out = tmp_path_factory.mktemp("bundles") / "instantir"
    assert main(words(published, out)) == 0
    return out


def flat(nested: Nested) -> Nested:
    """Nested dicts under dotted names."""
    inner = {k: flat(v) if isinstance(v, dict) else {"": v} for k, v in nested.items()}
    return {".".join(filter(None, (k, i))): v for k, of in inner.items() for i, v in of.items()}


def without(of: Nested, part: str) -> Nested:
    return {key: held for key, held in of.items() if part not in key}


def renamed(of: Nested, names: dict[str, str]) -> Nested:
    made = dict(of)
    for name, other in names.items():
        made = {key.replace(name, other): value for key, value in made.items()}
    assert len(made) == len(of) and made.keys() != of.keys()
    return made


def otherwise(shapes: Nested) -> Nested:
    """The same files as other versions of the libraries wrote them."""
    made = shapes | {origin: renamed(shapes[origin], names) for origin, names in SPELLINGS.items()}
    for encoder, ids in (("text_encoder", "embeddings."), ("text_encoder_2", "text_model.embeddings.")):
        made[encoder] = made[encoder] | {f"{ids}position_ids": (1, 77)}
    return made


def on_disk(shapes: Nested, folder: Path) -> dict[str, Tensors]:
    """Files of these names and shapes, with holes for bytes, as a build finds them."""
    found = {}
    for name, of in shapes.items():
        specs = {k: TensorSpec("int64" if k.endswith("_ids") else "float16", s) for k, s in flat(of).items()}
        write_tensors(folder / f"{name}.safetensors", specs, (), "a hole")
        found["lora" if name == "previewer" else name] = find(folder / f"{name}.safetensors")
    return found


def as_read(found: dict[str, Tensors]) -> dict[str, Tensors]:
    return {origin: SYSTEM.origins[origin].rename(held) for origin, held in found.items()}


def decided(preset: str, found: dict[str, Tensors], **options: Any) -> Settings:
    """What a build makes of these files."""
    places = {name: held.folder / min(held.sources) for name, held in found.items()}
    lora = lora_of(LORA, found["lora"], 1.0, merged=False) if "lora" in found else None
    return SYSTEM.decide(Preset(preset, PRESETS[preset], explicit=False), options, UserFiles(found, places, lora))


def wanted(settings: Settings) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> the shapes of its parameters."""
    specs = SYSTEM.components(settings) | SYSTEM.build_time(settings)
    return {c: {name: tuple(s.shape) for name, s in parameter_specs(spec).items()} for c, spec in specs.items()}


def plain(parameter: str) -> str:
    """A parameter's name but for what tells our modules and roles apart."""
    return re.sub(r"processor_\d+", "processor", parameter.removeprefix("unet.").removeprefix("model."))


@pytest.mark.parametrize("mode", ["branch", "merge"])
@pytest.mark.parametrize("spelt", [lambda shapes: shapes, otherwise], ids=["published", "otherwise"])
@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_every_parameter_has_its_name_and_every_name_is_used(
    tmp_path: Path, preset: str, spelt: Callable[[Nested], Nested], mode: str
) -> None:
    found = as_read(on_disk(spelt(shapes_of(preset)), tmp_path))
    if mode == "merge":
        found["lora"] = dataclasses.replace(found["lora"], tensors={})
    settings = decided(preset, {})
    assert settings.lora is not None
    lora = dataclasses.replace(settings.lora, merged=mode == "merge")
    parameters = wanted(dataclasses.replace(settings, lora=lora))
    references = reference_parameters(parameters, found, SYSTEM)  # refuses other shapes and names without a use
    assert {c: of.keys() for c, of in references.items()} == {c: of.keys() for c, of in parameters.items()}
    key_at = {(origin, r.offset): key for origin, held in found.items() for key, r in held.tensors.items()}
    meanings: dict[tuple[str, str], set[str]] = {}
    for component, of in references.items():
        taken = [(str(r.folder), key_at[str(r.folder), r.offset]) for r in of.values()]
        assert len(set(taken)) == len(taken), component
        for parameter, place in zip(of, taken, strict=True):
            meanings.setdefault(place, set()).add(plain(parameter))
    unused = [(o, k) for o, h in found.items() for k in h.tensors if (o, k) not in meanings and "position_ids" not in k]
    assert {origin: len([o for o, _ in unused if o == origin]) for origin, _ in unused} == UNREAD
    with torch.device("meta"):
        unet = upstream.UNet2DConditionModel(**getattr(upstream, preset.upper()).unet)
    names, numbers = upstream.image_attentions(unet), set()
    for (origin, key), (parameter,) in meanings.items():  # two meanings would not unpack
        if origin == "adapter" and parameter.startswith("resampler."):
            assert key == parameter.replace("resampler.", "image_proj.")
        elif origin == "adapter":
            number = int(key.split(".")[1])
            assert parameter == key.replace(f"ip_adapter.{number}.", f"{names[number]}.")
            numbers.add(number)
        elif origin == "lora":
            assert key == parameter.replace("processor.", "").replace("resampler.", IN_LORA)
        elif origin in ("unet", "aggregator"):
            assert key == parameter
    assert numbers == names.keys()


@pytest.mark.parametrize(("preset", "of"), [("tiny", {"heads": 3, "head_width": 16}), ("full", {"heads": 12})])
def test_sizes_are_read_from_the_files(tmp_path: Path, preset: str, of: dict[str, int]) -> None:
    sizes = getattr(upstream, preset.upper())
    resampler = sizes.resampler | {"depth": 3, "queries": 6, "multiple": 2} | of
    shapes = upstream.file_shapes(dataclasses.replace(sizes, resampler=resampler, sft=24, rank=8))
    module = "mid_block.resnets.1.conv2"
    out, *rest = shapes["unet"][f"{module}.weight"]
    shapes["previewer"] |= {f"unet.{module}.lora_A.weight": (5, *rest), f"unet.{module}.lora_B.weight": (out, 5, 1, 1)}
    found = on_disk(shapes, tmp_path)
    settings = decided(preset, found)
    assert settings.sizes["resampler"] == resampler
    assert (settings.sizes["hidden"], settings.sizes["adaptive"]) == (24, True)
    assert settings.branches[module] == [5, 1 / 5]
    assert {tuple(b) for name, b in settings.branches.items() if name != module} == {(8, 1 / 8)}
    assert len(settings.branches) == len(shapes["previewer"]) // 2
    reference_parameters(wanted(settings), as_read(found), SYSTEM)


def test_released_sizes_are_read_from_the_released_shapes(tmp_path: Path) -> None:
    assert decided("full", on_disk(shapes_of("full"), tmp_path)) == decided("full", {})


def test_alpha_in_the_file_is_honoured(tmp_path: Path) -> None:
    modules = ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    alphas = {f"unet.{module}.alpha": torch.tensor(6.0) for module in modules}
    save_file(tensors()["previewer"] | alphas, tmp_path / "lora.safetensors")
    branches = decided("tiny", {"lora": find(tmp_path / "lora.safetensors")}).branches
    scales = {module: scale for module, (_, scale) in branches.items()}
    assert {scales.pop(module) for module in modules} == {1.5}
    assert set(scales.values()) == {0.25}


def attached(root: Path, folder: Path, lora_mode: str = "branch", **changed: Any) -> tuple[Weights, Nested]:
    """What a build makes of the files, without graphs: its references, and its accounts."""
    options = given(root, **changed) | {"lora_mode": lora_mode}
    request = Request("instantir", "tiny", folder / "b", Path(options.pop("weights")), system_options=options)
    folder.mkdir()
    stage(request, sha256_of_file).work(folder)
    weights = from_json(Weights, (folder / "weights.json").read_bytes(), "weights.json")
    return weights, json.loads((folder / "accounts.json").read_text())


def where(weights: Weights, component: str, reference: Reference) -> tuple[str, int, int]:
    """The file that a component's weight lies in, and its place there."""
    folder = weights.folders[reference.folder]
    return str(Path(folder.path or "") / reference.file), reference.offset, reference.length


def value(place: tuple[str, int, int], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(place[0], np.float32, place[2] // 4, offset=place[1])).view(shape)


def held_by(weights: Weights) -> dict[tuple[str, str], bytes]:
    """The bytes of every weight."""
    return {
        (component, name): value(where(weights, component, r), r.shape).numpy().tobytes()
        for component, of in weights.tensors.items()
        for name, r in of.items()
    }


def restored(folder: Path) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    with load(folder, threads=1) as restorer:
        return restorer.restore(image, steps=2, scale=1, seed=1, prompt="a photo").image


def test_both_layouts_and_the_variant_are_one_adapter(
    cache: Path, bundle: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, nested = tmp_path / "cache", flat(tensors()["adapter"])
    finished = {"copy_function": os.link, "ignore": shutil.ignore_patterns(".*")}  # hidden is what others are making
    shutil.copytree(cache / "build", own / "build", **finished)  # what is traced is not traced again
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(own))
    torch.save(renamed(nested, LAYOUT), mine / "flat.pt")
    save_file(nested, mine / "variant.safetensors")
    expected = held_by(read_bundle(bundle).weights)
    variant, _ = attached(mine, tmp_path / "attached", adapter="variant.safetensors")
    graphs = {place: data for place, data in held_by(variant).items() if place in expected}
    assert graphs == expected
    assert variant.folders["adapter"].path == str(mine)
    assert main(words(mine, tmp_path / "b", adapter="flat.pt")) == 0
    assert held_by(read_bundle(tmp_path / "b").weights) == expected
    assert Path(str(read_bundle(tmp_path / "b").weights.folders["adapter"].path)).is_relative_to(own / "converted")
    before = restored(bundle)
    assert main(["export", "clean"]) == 0
    assert not list((own / "build").glob("*/*"))
    assert np.array_equal(restored(tmp_path / "b"), before)


def test_one_unet_lies_on_the_disk_and_every_tensor_is_accounted_for(bundle: Path, published: Path) -> None:
    weights, file = read_bundle(bundle).weights, (published / FILES["unet"]).resolve()
    assert not (bundle / "weights").exists()
    assert sum(f.stat().st_size for f in bundle.rglob("*.safetensors")) < 10_000  # constants
    places = [(c, where(weights, c, r)) for c, of in weights.tensors.items() for r in of.values()]
    taken = {(component, *place[1:]) for component, place in places if place[0] == str(file)}
    assert {component for component, *_ in taken} == {"unet", "words"}
    expected = sorted(place[1:] for place in safetensors_header(file).values())
    assert sorted(tuple(place) for _, *place in taken) == expected
    assert_accounts(json.loads((bundle / "reports" / "weights.json").read_text()))


def assert_accounts(accounts: Nested, merged: int = 0) -> None:
    """Every tensor of every file counts once."""
    assert accounts.keys() == {"lora", *FILES} - {"previewer"}
    for origin, account in accounts.items():
        held = flat(tensors()["previewer" if origin == "lora" else origin])
        assert account["tensors"] == len(held)
        assert account["ignored"] == UNREAD.get(origin, 0)
        assert account["precomputed"] == (origin == "dino")  # the table of positions
        assert account["merged"] == (merged if origin == "lora" else 0)
        assert len(held) == sum(account[kind] for kind in ("referenced", "precomputed", "merged", "ignored"))
        if account["referenced"] == len(held):
            assert account["referenced_bytes"] == sum(tensor.nbytes for tensor in held.values())


def test_merging_writes_what_the_previewer_changes_and_nothing_else(mine: Path, tmp_path: Path) -> None:
    loud = tensors()["previewer"] | {"unet.mid_block.resnets.0.conv1.alpha": torch.tensor(6.0)}
    torch.save(loud, mine / FILES["previewer"])
    weights, accounts = attached(mine, tmp_path / "a", "merge", previewer=f"{FILES['previewer']}:0.5")
    assert_accounts(accounts, merged=len(tensors()["previewer"]))
    assert [name for name, folder in weights.folders.items() if folder.path is None] == ["merged"]
    made = safetensors_header(tmp_path / "a" / "weights" / "merged" / "merged.safetensors")
    assert [f.name for f in (tmp_path / "a" / "weights").iterdir()] == ["merged"]
    deltas = upstream.lora_deltas({key: tensor.double() for key, tensor in loud.items()})
    seen = set()
    for component, of in weights.tensors.items():
        for name, r in of.items():
            plainly = component.replace("preview", "base")  # the same network without the previewer's changes
            before, after = where(weights, plainly, weights.tensors[plainly][name]), where(weights, component, r)
            module = plain(name).replace("processor.", "").replace("resampler.", IN_LORA).removesuffix(".weight")
            if plainly == component or not name.endswith(".weight") or module not in deltas:
                assert Path(after[0]).is_absolute() and after == before, (component, name)
                continue
            assert after[0] == "merged.safetensors"
            ours = value((str(tmp_path / "a" / "weights" / "merged" / after[0]), *after[1:]), r.shape)
            theirs = value(before, r.shape).double() + 0.5 * deltas[module].view(r.shape)
            assert (ours - theirs).abs().max() <= 2e-7 * theirs.abs().max(), name
            seen.add((module, name))
    assert len(seen) == len(deltas) == len(made)
    assert any(made[name][0].shape[2:] == (3, 3) for _, name in seen)


def test_an_adapter_without_adaptive_norms_is_plain_and_says_so(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, previewer = tensors()["adapter"], tensors()["previewer"]  # which adapts the norms that are not there
    few = {k: t for k, t in previewer.items() if "mid_block" in k and ("_ip." in k or "conv1" in k)}  # trace sooner
    torch.save(adapter | {"ip_adapter": without(adapter["ip_adapter"], ".ln_")}, mine / "adapter.pt")
    torch.save(few, mine / FILES["previewer"])
    with caplog.at_level(logging.WARNING, "tilewright"):
        assert main(words(mine, tmp_path / "b", "--no-text")) == 0
    (said,) = [record.getMessage() for record in caplog.records if record.name == "tilewright"]
    assert "has no ln_k_ip" in said
    zeroed = {k: torch.zeros_like(t) if ".ln_" in k else t for k, t in adapter["ip_adapter"].items()}
    files = tensors() | {"adapter": adapter | {"ip_adapter": zeroed}, "previewer": few}
    eager, opened = upstream.Reference(files, upstream.TINY), read_bundle(tmp_path / "b")
    draw = torch.Generator().manual_seed(1)
    context, pooled, z = (torch.randn(s, generator=draw) for s in ((2, 16, 32), (2, 16), (1, 4, 8, 12)))
    features, control = torch.randn(2, 5, 32, generator=draw), torch.full((1, 1), 0.5)

    def run(component: str, **inputs: Any) -> dict[str, Any]:
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        signature = opened.manifest.components[component]
        made = open_engine(opened, component, signature.engines[0], Opening(threads=1)).run(arrays, signature.outputs)
        return {name: torch.from_numpy(array) for name, array in made.items()}

    fixed = run("words", context=context[1:], negative_context=context[:1]) | {"t": np.array([301], np.float32), "z": z}
    fixed |= {"pooled": pooled[1:], "negative_pooled": pooled[:1], "control": control}
    sizes = {"batch": 1, "h": 8, "w": 12, "h/2": 4, "w/2": 6}
    added = {n: s for n, s in opened.manifest.components["unet"].inputs.items() if re.fullmatch(r"r\d|mid", n)}
    added = {n: torch.randn([sizes.get(d, d) for d in s.shape], generator=draw) for n, s in added.items()}
    steered = [0.5 * added[f"r{i}"][0] for i in range(4)], 0.5 * added["mid"][0]
    for preview in (False, True):
        scale = {"lora_scale": np.array([preview], np.float32)}
        seen = run("look", features=features[1:], nothing=features[:1], **scale)
        ours = run("unet", **fixed, **seen, **scale, **added)["predicted"][0]
        tokens, twice = eager.tokens(features, preview), torch.cat([z, z])
        theirs = eager.eps(twice, torch.tensor(301), context, pooled, tokens, steered, preview)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def narrow(of: Nested, pattern: str) -> Nested:
    """As of a network whose context is narrower."""
    return {key: held[:, :24].clone() if re.search(pattern, key) else held for key, held in of.items()}


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


TEXT = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.zeros(32, 32)}
CONTROL = {"conv_in.weight": torch.zeros(16, 4, 3, 3), "controlnet_down_blocks.0.weight": torch.zeros(16, 16, 1, 1)}
UNKNOWN = {f"unet.down_blocks.7.conv1.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
PLAIN = {"image_proj": {"proj.weight": torch.zeros(128, 16)}}
SPOILT: dict[str, tuple[str, Callable[[Nested], Nested], str]] = {  # file, what becomes of it, what is said
    "adapter of another base": (
        "adapter",
        lambda held: held | {"ip_adapter": narrow(held["ip_adapter"], "to_[kv]_ip")},
        "its image keys read 24 numbers, SDXL's context has 32: it is of another base model",
    ),
    "adapter without some norms": (
        "adapter",
        lambda held: held | {"ip_adapter": without(held["ip_adapter"], "15.ln_k_ip")},
        "lacks 2 tensors: ip_adapter.15.ln_k_ip.linear.bias, ip_adapter.15.ln_k_ip.linear.weight;",
    ),
    "adapter of CLIP's image tokens": (
        "adapter",
        lambda held: held | {"image_proj": narrow(held["image_proj"], "^proj_in.weight")},
        "its resampler cannot be read (it makes 32 numbers of 24, not 32 of DINOv2's 32)",
    ),
    "adapter with half a resampler": (
        "adapter",
        lambda held: held | {"image_proj": without(held["image_proj"], "proj_out")},
        "resampler cannot be read ('image_proj.proj_out.weight')",
    ),
    "adapter without resampler": ("adapter", lambda held: held | PLAIN, "holds no image keys with a resampler"),
    "adapter with code": ("adapter", lambda held: held | {"x": Trap()}, "adapter.pt: holds more than tensors"),
    "aggregator with text": ("aggregator", lambda held: held | TEXT, "has text attention"),
    "aggregator that is a ControlNet": ("aggregator", lambda _: CONTROL, "lacks 'controlnet_mid_block.0.mlp_shared.0"),
    "aggregator cut short": ("aggregator", lambda held: without(held, "ref_conv_in.w"), "1 tensors: ref_conv_in.w"),
    "previewer of other modules": ("previewer", lambda held: held | UNKNOWN, "does not have: down_blocks.7.conv1;"),
    "previewer with more": (
        "previewer",
        lambda held: held | {"unet.x.weight": torch.zeros(3)},
        "holds unexpected 1 tensors: unet.x.weight; give InstantIR's previewer LoRA",
    ),
    "UNet of another base": (
        "unet",
        lambda held: narrow(held, r"attn2\.to_[kv]\."),
        "'cross_attention_dim' is 32, in weights ",
    ),
}
ARGUMENTS = {f"no {name}": (8, [], {name: None}, f"give --{name}") for name in ("dino", *OWN)} | {
    "no weights": (2, [], {"weights": None}, "--weights DIR"),
    "no steps": (2, ["--steps", "0"], {}, "--steps 0 must lie in 1..999"),
    "too many steps": (2, ["--steps", "1000"], {}, "--steps 1000 must lie in 1..999"),
    "a strength that is none": (2, ["--previewer", "x.bin:nan"], {}, "LoRA strength 'nan' of x.bin is not a finite"),
    "guidance that is none": (2, ["--guidance", "nan"], {}, "invalid finite value: 'nan'"),
    "nothing to merge": (2, ["--lora-mode", "merge", "--random-weights", "0"], {"previewer": None}, "give --previewer"),
    "words without encoders": (2, ["--prompt", "a", "--no-text"], {}, "--prompt needs the text encoders"),
}


def refused(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str]) -> str:
    """What a command says that must fail with this code, in one line beside its stages; it leaves nothing in out/."""
    Path("out").mkdir()
    capsys.readouterr()
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not re.fullmatch(r"(trace|attach) +(started|cached|done in .*)", line)]
    assert len(lines) == 1 and lines[0].startswith("tilewright: ") and len(lines[0]) < 700, lines
    assert not list(Path("out").iterdir()) and not Path("ran").exists()
    return lines[0]


@pytest.mark.parametrize(("origin", "spoil", "part"), SPOILT.values(), ids=SPOILT)
def test_wrong_files_are_told_in_one_line(
    bundle: Path, mine: Path, capsys: pytest.CaptureFixture[str], origin: str, spoil: Any, part: str
) -> None:
    (save_file if origin == "unet" else torch.save)(spoil(tensors()[origin]), mine / FILES[origin])
    assert part in refused(capsys, 8, words(mine, Path("out/b")))


def test_merging_refuses_what_it_cannot_merge(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tensors()["previewer"] | UNKNOWN, mine / FILES["previewer"])
    said = refused(capsys, 8, words(mine, Path("out/b"), "--lora-mode", "merge"))
    assert "adapts 1 modules that the network does not have: down_blocks.7.conv1;" in said


@pytest.mark.parametrize(("code", "more", "changed", "part"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_told_in_one_line(
    mine: Path, capsys: pytest.CaptureFixture[str], code: int, more: Any, changed: Any, part: str
) -> None:
    assert part in refused(capsys, code, words(mine, Path("out/b"), *more, **changed))


@pytest.mark.parametrize(("flag", "choice"), [("sampler", "euler"), ("adares", "maybe"), ("sampler", "2")])
def test_unknown_choices_are_told_in_one_line(
    bundle: Path, mine: Path, capsys: pytest.CaptureFixture[str], flag: str, choice: str
) -> None:
    sample = str(Path(__file__).parents[3] / "docs" / "sample.png")
    said = refused(capsys, 2, ["runtime", "restore", sample, "out/o.png", "--bundle", str(bundle), f"--{flag}", choice])
    assert flag in said and choice in said
    choices = {"sampler": ("ddim", "ddpm"), "adares": ("code", "off", "paper")}[flag]
    assert choice == "2" or ("is not one of" in said and all(name in said for name in choices))


def test_of_two_variants_the_plain_or_the_asked_one_is_taken(mine: Path) -> None:
    half = mine / FILES["unet"].replace(".safe", ".fp16.safe")
    save_file({key: tensor.half() for key, tensor in tensors()["unet"].items()}, half)
    for variant, file in ({}, mine / FILES["unet"]), ({"variant": "fp16"}, half):
        found = Request("instantir", "tiny", mine / "b", mine, system_options=variant).tensors
        assert list(found["unet"].sources.values()) == [str(file)]
        assert list(found["vae"].sources.values()) == [str(mine / FILES["vae"])]


def test_stand_ins_are_the_published_files(tmp_path: Path) -> None:
    assert main(["export", "stand-in", "instantir", "-o", str(tmp_path / "x")]) == 0
    written = {p.relative_to(tmp_path / "x").as_posix(): p for p in (tmp_path / "x").rglob("*.safetensors")}
    assert sum(p.stat().st_blocks * 512 for p in (tmp_path / "x").rglob("*")) < 10_000_000
    for origin, file in FILES.items():
        header = safetensors_header(written.pop(re.sub(r"\.(pt|bin)$", ".safetensors", file)))
        made, expected = {key: spec.shape for key, (spec, _, _) in header.items()}, shapes_of("full")[origin]
        assert made == expected
    assert not written


def test_the_stored_program_is_that_of_a_full_build() -> None:
    assert_stored("instantir", SYSTEM, decided("full", {}))
