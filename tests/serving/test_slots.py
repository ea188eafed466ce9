"""Slots of a server give the logits that no cache gives, also where layers have sizes of their own or borrow keys."""

import pytest
import torch

from lapis.model.transformer import Transformer
from lapis.serving.engine.slots import Slots, slot_bytes
from tests.model.conftest import SHAPES


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma4", "gemma4-experts"])
def test_rows_of_unequal_lengths_equal_no_cache(kind: str) -> None:
    torch.manual_seed(0)
    model = Transformer(SHAPES[kind]).eval()
    ids_BT = torch.randint(0, 31, (2, 14))
    slots = Slots(model.config, 2, 32, torch.float32, torch.device("cpu"))
    assert sum(store[0, :, 0].nbytes for store in (*slots.keys, *slots.values)) == slot_bytes(
        model.config, torch.float32
    )
    for row in range(2):
        read = ids_BT[row : row + 1, : 6 + row]
        torch.testing.assert_close(model(read, cache=slots.one(row)), model(read), rtol=0, atol=1e-5)
        slots.append(row, read[0].tolist())
    for step in range(5):
        cache = slots.first(2)
        new_B1 = torch.stack((ids_BT[0, 6 + step], ids_BT[1, 7 + step]))[:, None]
        got = model(new_B1, positions_BT=cache.positions_B1, cache=cache)
        for row in range(2):
            slots.append(row, [int(new_B1[row, 0])])
            alone = model(ids_BT[row : row + 1, : 7 + step + row])[0, -1]
            torch.testing.assert_close(got[row, -1], alone, rtol=0, atol=1e-5)
