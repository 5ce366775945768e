"""Statistics of the data that starts of adapters need."""

from __future__ import annotations

import pytest
import torch
from cases import TINY
from torch import nn

from visadapt.adapters.lora import LoRA
from visadapt.core.adapted import Adapted
from visadapt.core.calibrate import input_moments
from visadapt.errors import InputError
from visadapt.testing import assert_close, noise, tiny_backbone

X = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def losses(adapted, count=2):
    return [lambda n=n: adapted(X + n).tokens.square().mean() for n in range(count)]


@pytest.mark.parametrize(("backbone", "roles"), [("vit", ["q", "v", "fc2", "patch"]), ("resnet", ["conv", "down"])])
def test_input_moments_are_those_of_what_the_weight_is_multiplied_with(backbone, roles):
    adapted = Adapted(tiny_backbone(TINY[backbone])).eval()
    body, sites = adapted.backbone.body, [s for s in adapted.backbone.sites() if s.role in roles]
    found = input_moments(adapted, sites, losses(adapted))
    seen = {s.path: [] for s in sites}
    for path, inputs in seen.items():
        body.get_submodule(path).register_forward_pre_hook(lambda m, args, kept=inputs: kept.append(args[0]))
    for loss in losses(adapted):
        loss()
    for one in sites:
        module, x = body.get_submodule(one.path), torch.cat(seen[one.path]).detach()
        weight = module.weight.detach().flatten(1)
        moments = found[one.key]
        assert moments.shape == 2 * (weight.shape[1],)
        if isinstance(module, nn.Conv2d):
            y = nn.functional.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation)
            y = y.detach().transpose(0, 1).flatten(1).T
        else:
            y = (x @ weight.T).flatten(0, -2)
        assert_close(weight @ moments @ weight.T, y.T @ y / len(y), one.key, 1e-4)
    with pytest.raises(InputError, match="a batch of training data"):
        input_moments(adapted, sites, [])


def test_input_moments_are_measured_without_adapters_in_eval_mode():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    adapted.add("a", LoRA(rank=2, dropout=0.5, targets=["all-linear"]))
    sites = [s for s in adapted.backbone.sites() if s.role == "fc2"]
    before = input_moments(adapted, sites, losses(adapted))
    noise(adapted.adapters["a"], 1.0)
    adapted.train()
    after = input_moments(adapted, sites, losses(adapted))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert adapted.adapters["a"].training and adapted.is_enabled("a")
    assert not any(m._forward_pre_hooks for m in adapted.backbone.body.modules())


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_moments_are_of_the_padded_input(mode):
    adapted = Adapted(tiny_backbone(TINY["resnet"])).eval()
    site = next(s for s in adapted.backbone.sites() if s.role == "conv")
    conv = adapted.backbone.body.get_submodule(site.path)
    conv.padding_mode = mode
    same = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding="same", padding_mode=mode)
    adapted.backbone.body.set_submodule(site.path, same)
    seen = []
    same.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = input_moments(adapted, [site], losses(adapted, 1))[site.key]
    padded = nn.functional.pad(seen[0], (1, 1, 1, 1), "constant" if mode == "zeros" else mode)
    rows = nn.functional.unfold(padded, 3).transpose(1, 2).flatten(0, 1)
    assert_close(found, rows.T @ rows / len(rows))


def test_a_site_that_never_runs_is_named():
    adapted = Adapted(tiny_backbone(TINY["vit"])).eval()
    with pytest.raises(InputError, match=r"a batch of training data that reaches blocks\.0\.attn\.qkv"):
        input_moments(adapted, [s for s in adapted.backbone.sites() if s.role == "q"], [])
