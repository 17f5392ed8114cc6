"""Text encoders of the restoration systems. They take ids without a mask, so they read padding too, as in training."""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

__all__ = ["T5", "ClipText"]


class T5(nn.Module):
    """T5's encoder: hidden states [B, N, D] of ids [B, N]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = T5EncoderModel(T5Config(**config))
        # the library holds one table under two names, which a trace cannot tell apart; the published name stays
        self.model.encoder.set_input_embeddings(None)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(inputs_embeds=self.model.shared(ids)).last_hidden_state


class ClipText(nn.Module):
    """CLIP's text encoder: the hidden state [B, D] at the end of each text, which has its highest id."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        # with 2, the end's id in published files, the library pools at the highest id of a text; nothing reads the
        # id of the beginning, but the library warns if it lies outside of the vocabulary
        self.model = CLIPTextModel(CLIPTextConfig(**config | {"bos_token_id": 0, "eos_token_id": 2}))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).pooler_output
