"""Text encoders against the bare library classes; their graphs against eager PyTorch."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from support.lazily import Lazily
from tilewright.export.networks.text import T5, ClipText
from tilewright.export.system import ComponentSpec
from tilewright.runtime.bundle.program import TensorSpec

# the library takes the logarithm of a distance of 0 and discards it, which NumPy remarks on when it is folded
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")

T5_TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
CLIP_TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 62,
}
LENGTHS = (12, 300)  # of T5's ids; from a distance of 128 on, all are alike to it


def made(network: nn.Module) -> nn.Module:
    """The network with weights of order one everywhere, so that no term is too small to be missed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return network.eval().requires_grad_(False)


def random_ids(batch: int, length: int, top: int = 64) -> torch.Tensor:
    return torch.randint(1, top, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def bare_t5() -> nn.Module:
    """The library's class, whose attention is written out."""
    return made(T5EncoderModel(T5Config(**T5_TINY, attn_implementation="eager")))


@pytest.mark.slow
def test_t5_has_one_table_of_embeddings_under_its_published_name(bare_t5):
    keys = {key for key in bare_t5.state_dict() if key != "encoder.embed_tokens.weight"}
    assert "shared.weight" in keys
    network = T5(T5_TINY)
    assert set(network.state_dict()) == {f"model.{key}" for key in keys}
    assert {name for name, _ in network.named_parameters()} == set(network.state_dict())


@pytest.mark.parametrize("length", LENGTHS)
def test_t5_is_the_bare_class_and_attends_to_padding(bare_t5, length):
    network = T5(T5_TINY).eval()
    network.model.load_state_dict({k: v for k, v in bare_t5.state_dict().items() if "embed_tokens" not in k})
    ids = random_ids(1, length)
    ids[:, length // 2 :] = 0
    with torch.no_grad():
        ours = network(ids)
    assert ours.shape == (1, length, 32)
    torch.testing.assert_close(ours, bare_t5(ids).last_hidden_state, rtol=0, atol=1e-5)
    everything = bare_t5(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours, everything, rtol=0, atol=1e-5)
    masked = bare_t5(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (ours - masked).abs().max() > 0.1


# a config may say nothing of the end, or what later versions of the library write
@pytest.mark.parametrize("config", [CLIP_TINY, CLIP_TINY | {"eos_token_id": 63}, CLIP_TINY | {"eos_token_id": 2}])
def test_clip_pools_at_the_first_of_the_highest_ids(config):
    bare = made(CLIPTextModel(CLIPTextConfig(**CLIP_TINY, eos_token_id=2, attn_implementation="eager")))
    network = ClipText(config).eval()
    assert set(network.state_dict()) == {f"model.{key}" for key in bare.state_dict()}
    network.model.load_state_dict(bare.state_dict())
    ids = random_ids(4, 16, 40)
    places = [5, 0, 15, 9]
    ids[0, 5], ids[1, 0], ids[2, 15] = 63, 63, 50
    ids[3, 9:] = 63  # padded with the id of the end
    with torch.no_grad():
        ours, hidden = network(ids), bare(ids).last_hidden_state
    assert ours.shape == (4, 16)
    for i, place in enumerate(places):
        torch.testing.assert_close(ours[i], hidden[i, place], rtol=0, atol=1e-5)


def test_clip_does_not_look_past_the_end():
    network, ids = made(ClipText(CLIP_TINY)), random_ids(1, 16, 40)
    ids[0, 7] = 63
    other = ids.clone()
    other[0, 8:] = 1
    before = ids.clone()
    before[0, 6] = 41
    torch.testing.assert_close(network(ids), network(other), rtol=0, atol=1e-6)
    assert (network(ids) - network(before)).abs().max() > 0.1


def ids_source(module: Callable[[], nn.Module], ids: tuple[int | str, int], output: tuple) -> ComponentSpec:
    return ComponentSpec(module, {"ids": TensorSpec("int64", ids)}, {"output": TensorSpec("float32", output)})


@pytest.fixture(scope="module")
def t5s(tmp_path_factory, opened) -> dict[int, Any]:
    """T5 for each length of its ids."""
    return Lazily(
        lambda length: opened(
            ids_source(lambda: T5(T5_TINY), (1, length), (1, length, 32)), tmp_path_factory.mktemp("t5")
        )
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory, opened) -> Any:
    """CLIP for any number of texts."""
    source = ids_source(lambda: ClipText(CLIP_TINY), ("batch", 16), ("batch", 16))
    return opened(source, tmp_path_factory.mktemp("clip"))


def assert_needs_each_parameter(network: Any) -> None:
    graph = network.model.graph
    outside = {n for n, v in graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert outside == {n for n, _ in network.eager.named_parameters()}
    nodes = list(graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    assert [node.op_type for node in nodes].count("Attention") == 2


def assert_runs_as_eager(network: Any, ids: torch.Tensor) -> None:
    expected = network.eager(ids).double().numpy()
    assert expected.std() > 0.1
    for engine in network.engines:
        ours = engine.run({"ids": ids.numpy()}, ["output"])["output"]
        assert ours.shape == expected.shape
        # float32 sums in another order; measured 1e-6
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_t5s_graph_runs_as_eager_pytorch_does(t5s, length):
    assert_needs_each_parameter(t5s[length])
    assert_runs_as_eager(t5s[length], random_ids(1, length))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_clips_graph_runs_as_eager_pytorch_does(clip, batch):
    assert_needs_each_parameter(clip)
    ids = random_ids(batch, 16, 40)
    ids[-1, 9:] = 63  # a tie, which the lowest place wins
    assert_runs_as_eager(clip, ids)
