from __future__ import annotations

import pytest
import torch

from visadapt.backbones.patch_embed import BAND_MODES, expand_patch_embed
from visadapt.errors import InputError


@pytest.mark.parametrize("chans", [1, 2, 3, 4, 5, 12, 13])
@pytest.mark.parametrize("mode", ["repeat", "mean"])
def test_equal_bands_give_the_response_to_grey(mode, chans):
    weight = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    wide = expand_patch_embed(weight, chans, mode)
    assert wide.shape == (8, chans, 4, 4)
    torch.testing.assert_close(wide.sum(1), weight.sum(1))


def test_modes_differ_as_described():
    weight = torch.randn(8, 3, 4, 4)
    repeat, mean, zero = (expand_patch_embed(weight, 7, mode) for mode in BAND_MODES)
    torch.testing.assert_close(repeat[:, [0, 3, 6]], weight[:, [0, 0, 0]] / 3)
    torch.testing.assert_close(repeat[:, [2, 5]], weight[:, [2, 2]] / 2)
    torch.testing.assert_close(mean, weight.mean(1, keepdim=True).expand(-1, 7, -1, -1) * 3 / 7)
    assert torch.equal(zero[:, :3], weight) and not zero[:, 3:].any()
    assert torch.equal(expand_patch_embed(weight, 3, "repeat"), weight)
    zero.mul_(2)
    assert not torch.equal(zero[:, :3], weight), "the result must not share memory with the RGB weight"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3, 4, 4), 4, "repaet"), "unknown mode 'repaet'.*did you mean 'repeat'"),
        ((torch.zeros(2, 4, 4, 4), 5, "mean"), r"only an RGB .* not \(2, 4, 4, 4\)"),
        ((torch.zeros(2, 3, 4, 4), 0, "mean"), "at least one band"),
        ((torch.zeros(2, 3, 4, 4), 1, "zero"), "only 1 bands; use mode 'mean'"),
    ],
)
def test_bands_that_make_no_sense(args, message):
    with pytest.raises(InputError, match=message):
        expand_patch_embed(*args)
