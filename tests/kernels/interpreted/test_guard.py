"""A process that interprets says so when it is told to compile halfway."""

import pytest
import torch

from tilewright.kernels.codebook_from_logits import codebook_from_logits


@pytest.mark.parametrize("value", [None, "0"])
def test_a_variable_that_changed_after_import_is_named(value, monkeypatch):
    given = torch.randn(2, 6), torch.randn(2, 3, 4)
    codebook_from_logits(*given)
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET changed after .* set it before"):
        codebook_from_logits(*given)
