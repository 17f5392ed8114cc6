"""Text encoders of the restoration systems: ids in, no mask, so that padding is attended to as in training."""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

__all__ = ["T5", "ClipText"]


class T5(nn.Module):
    """Ids [B, N] to hidden states [B, N, D]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = T5EncoderModel(T5Config(**config))
        # the library has one table under two names, which a trace could not tell apart; the published one stays
        self.model.encoder.set_input_embeddings(None)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(inputs_embeds=self.model.shared(ids)).last_hidden_state


class ClipText(nn.Module):
    """Ids [B, N] to the hidden state of each text's highest id, which ends it, [B, D]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        # 2 is the published configurations' id of the end, which makes the library pool at the highest id; the id of
        # the beginning is read by nothing, but the library warns where it lies outside of the vocabulary
        self.model = CLIPTextModel(CLIPTextConfig(**config | {"bos_token_id": 0, "eos_token_id": 2}))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).pooler_output
