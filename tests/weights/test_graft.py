"""A graft is exact arithmetic on the right tensors, and says what it did with the others."""

import pytest
import torch

from lapis.weights.graft import graft


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_graft_equals_float64(trio, folders, tmp_path, shards, scale):
    models = trio(shards=shards)
    result = graft(**models, out=tmp_path / "out", scale=scale)
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    assert out.keys() == onto.keys()
    for name, tensor in out.items():
        if "norm" in name:
            assert torch.equal(tensor, onto[name])
        elif "embed" in name:
            assert torch.equal(tensor[[33, 34]], chat[name][[33, 34]])
            rest = [i for i in range(tensor.shape[0]) if i not in (33, 34)]
            assert torch.equal(tensor[rest], onto[name][rest])
        else:
            exact = onto[name].double() + scale * (chat[name].double() - base[name].double())
            assert torch.equal(tensor, exact.to(tensor.dtype))
    assert result.tensors == {"merged": 14, "copied": 6, "skipped": 11}
