"""Mask2FormerHead and its parts."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from visadapt.errors import InputError
from visadapt.heads._mask2former import criterion
from visadapt.heads._mask2former.criterion import Target, important_points, match, set_losses, targets_of
from visadapt.heads._mask2former.decoder import hidden_places
from visadapt.heads._mask2former.deformable import DeformableAttention, deformable_attention
from visadapt.heads._mask2former.layers import sine_positions
from visadapt.heads.mask2former import Mask2FormerHead
from visadapt.registry import HEADS, arguments_of
from visadapt.testing import assert_close, noise

CHANNELS = [8, 12, 16, 20]
SIZES = [(13, 18), (7, 9), (4, 5), (2, 3)]
SMALL = dict(width=32, queries=8, heads=4, encoder_layers=2, decoder_layers=2, encoder_hidden=24, decoder_hidden=40)


def small(**changes):
    return Mask2FormerHead(3, CHANNELS, **{**SMALL, "points": 64, **changes})


def random_maps(batch=2, sizes=SIZES):
    return [torch.randn(batch, dim, *size) for dim, size in zip(CHANNELS, sizes)]


def halves(*columns, size=16):
    """Label maps (B, size, size): class 0 left of the column, class 1 from there on."""
    where = torch.arange(size).expand(size, -1)
    return torch.stack([(where >= column).long() for column in columns])


# ---- deformable attention -------------------------------------------------------------------------------------------
def bilinear(cells, x, y):
    """Value at (x, y) of cells (h, w, d), whose corner is (0, 0) and whose centres are at halves; zero outside."""
    h, w, _ = cells.shape
    left, top = (x - 0.5).detach().floor(), (y - 0.5).detach().floor()
    total = 0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < h and 0 <= j < w:
            total = total + cells[int(i), int(j)] * (1 - (y - 0.5 - i).abs()) * (1 - (x - 0.5 - j).abs())
    return total


def test_deformable_attention_is_the_weighted_sum_of_bilinear_values():
    shapes, batch, heads, dim, queries, points = [(2, 3), (4, 1)], 2, 2, 3, 5, 2
    value = torch.randn(batch, 10, heads, dim, dtype=torch.double)
    locations = torch.rand(batch, queries, heads, 2, points, 2, dtype=torch.double) * 1.6 - 0.3  # some outside
    weights = torch.randn(batch, queries, heads, 2, points, dtype=torch.double)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    rows = []
    for b, q, n in itertools.product(range(batch), range(queries), range(heads)):
        total = torch.zeros(dim, dtype=torch.double)
        for level, (h, w) in enumerate(shapes):
            start = sum(i * j for i, j in shapes[:level])
            cells = value[b, start : start + h * w, n].reshape(h, w, dim)
            for p in range(points):
                x, y = locations[b, q, n, level, p]
                total = total + weights[b, q, n, level, p] * bilinear(cells, x * w, y * h)
        rows.append(total)
    wanted = torch.stack(rows).reshape(batch, queries, heads * dim)
    found = deformable_attention(value, shapes, locations, weights)
    assert_close(found, wanted)
    cotangent = torch.randn_like(wanted)
    gradients = (torch.autograd.grad((y * cotangent).sum(), inputs) for y in (found, wanted))
    for name, one, other in zip(("value", "locations", "weights"), *gradients):
        assert_close(one, other, name)


def test_heads_of_deformable_attention_start_in_directions_of_their_own():
    attention = DeformableAttention(8, 4, 2, 3)
    attention.start()
    offsets = attention.sampling_offsets.bias.reshape(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for level, k in itertools.product(range(2), range(3)):
        assert torch.allclose(offsets[:, level, k], (k + 1) * directions, atol=1e-6)
    shapes = [(1, 6), (1, 3)]
    for layer in (attention.value_proj, attention.output_proj):
        nn.init.eye_(layer.weight)
    x, reference = torch.randn(1, 9, 8), torch.full((9, 2), 0.5)
    # offsets count cells: from x = 3 in six cells, head 0 sees 4, 5 and 6; from x = 1.5 in three cells 2.5, 3.5, 4.5
    row, coarse = x[0, :6, :2], x[0, 6:, :2]
    seen = (row[3] + row[4]) / 2 + (row[4] + row[5]) / 2 + row[5] / 2 + coarse[2]
    found = attention(x, torch.zeros(9, 8), reference, shapes) - x
    assert_close(found[0, :, :2], (seen / 6).expand(9, 2))


def test_positions_tell_row_and_column():
    places = sine_positions((3, 5), 16, torch.device("cpu")).reshape(3, 5, 16)
    assert torch.equal(places[1, :, :8], places[1, :1, :8].expand(5, 8))
    assert torch.equal(places[:, 2, 8:], places[:1, 2, 8:].expand(3, 8))
    angle = torch.tensor(2 * torch.pi * 2 / 5)  # second of five columns
    wanted = [f(angle / 10000 ** (k / 4)) for k in range(4) for f in (torch.sin, torch.cos)]
    assert_close(places[0, 1, 8:], torch.stack(wanted))


# ---- the head -------------------------------------------------------------------------------------------------------
def test_a_query_looks_at_its_own_mask_and_everywhere_if_that_is_empty():
    masks = torch.full((1, 2, 4, 4), -5.0)
    masks[0, 0, :, 2:] = 5.0
    masks.requires_grad_()
    hidden = hidden_places(masks, (2, 2))
    assert hidden.tolist() == [[[True, False, True, False], [False] * 4]] and not hidden.requires_grad


def test_scores_sum_over_queries_what_class_and_mask_say():
    head = small().eval()
    maps = random_maps()
    outputs = list(head.outputs(maps))
    assert len(outputs) == 3 and all(o[0].shape == (2, 8, 4) and o[1].shape == (2, 8, 13, 18) for o in outputs)
    logits, masks = outputs[-1]
    wanted = torch.zeros(2, 3, 13, 18)
    for b, q, k in itertools.product(range(2), range(8), range(3)):
        wanted[b, k] += logits[b, q].softmax(0)[k] * masks[b, q].sigmoid()
    scores = head(maps)
    assert_close(scores, wanted)
    assert scores.min() >= 0 and head(random_maps(1, [(1, 5), (3, 3), (2, 1), (1, 2)])).shape == (1, 3, 1, 5)
    for b in range(2):
        assert_close(head([m[b : b + 1] for m in maps]), scores[b : b + 1], f"image {b} alone")


def test_values_are_those_of_another_implementation():
    """Mean, spread and one value of the masks, as transformers 5.24 computes them with the same parameters."""
    head = small().eval()
    with torch.no_grad():
        for name, value in head.named_parameters():
            fill = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            value.copy_(0.2 * fill + (value.ndim == 1 and name.endswith("weight")))
        cells = (torch.arange(2 * d * h * w).reshape(2, d, h, w) for d, (h, w) in zip(CHANNELS, SIZES))
        maps = [(0.37 * c).sin() for c in cells]
        masks = [m for _, m in head.outputs(maps)]
    found = torch.tensor([[m.mean(), m.std(), m[1, 3, 5, 7]] for m in masks])
    assert_close(found, torch.tensor(RECORDED), tolerance=1e-4)


RECORDED = [[-4.65865, 3.00209, -9.21824], [-6.23001, 3.57601, -8.44704], [-8.27531, 4.57128, -9.71789]]


@pytest.mark.parametrize("linked", [False, True])
def test_all_parameters_learn(linked):
    head = small(linked_queries=linked)
    noise(head)
    sum(head.loss(random_maps(), halves(5, 9), torch.randn(6, 32) if linked else None).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert ("querys2feat" in dict(head.named_children())) == linked == (not hasattr(head, "query_embed"))


def test_linked_queries_are_positions_and_a_layer_makes_the_features():
    head, linked = small(), small(linked_queries=True)
    given, maps = torch.randn(8, 32), random_maps()
    state = {k: v for k, v in head.state_dict().items() if not k.startswith("query")}
    linked.load_state_dict(state | {f"querys2feat.{k}": v for k, v in linked.querys2feat.state_dict().items()})
    with torch.no_grad():
        head.query_embed.weight.copy_(given)
        head.query_feat.weight.copy_(linked.querys2feat(given))
    assert_close(linked(maps, given), head(maps))
    first = next(linked.outputs(maps, given.requires_grad_()))[1]  # read before any layer sees the positions
    assert torch.autograd.grad(first.square().sum(), given)[0].abs().sum(1).min() > 0
    nn.init.zeros_(linked.querys2feat.weight)
    assert torch.autograd.grad(linked(maps, given).square().sum(), given)[0].abs().sum(1).min() > 0


def test_a_state_fits_a_head_built_from_stored_arguments():
    head = HEADS.build(dict(type="Mask2FormerHead", num_classes=3, **SMALL), in_channels=tuple(CHANNELS)).eval()
    noise(head)
    again = Mask2FormerHead(**arguments_of(head)).eval()
    again.load_state_dict(head.state_dict())
    maps = random_maps()
    assert torch.equal(again(maps), head(maps))


def test_parameters_have_the_names_and_shapes_of_mmdet():
    def layer(name, *weight):
        return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}

    wanted = {
        **{f"{n}.weight": (rows, 32) for n, rows in (("query_embed", 8), ("query_feat", 8), ("level_embed", 3))},
        **layer("cls_embed", 4, 32),
        **{k: v for i in (0, 2, 4) for k, v in layer(f"mask_embed.{i}", 32, 32).items()},
        "pixel_decoder.level_encoding.weight": (3, 32),
        "pixel_decoder.lateral_convs.0.conv.weight": (32, 8, 1, 1),
        "pixel_decoder.output_convs.0.conv.weight": (32, 32, 3, 3),
        **layer("pixel_decoder.lateral_convs.0.gn", 32),
        **layer("pixel_decoder.output_convs.0.gn", 32),
        **layer("pixel_decoder.mask_feature", 32, 32, 1, 1),
        **layer("transformer_decoder.post_norm", 32),
    }
    for i in range(3):
        wanted |= layer(f"pixel_decoder.input_convs.{i}.conv", 32, [20, 16, 12][i], 1, 1)
        wanted |= layer(f"pixel_decoder.input_convs.{i}.gn", 32)
    for i in range(2):
        at = f"pixel_decoder.encoder.layers.{i}"
        for name, rows in (("sampling_offsets", 96), ("attention_weights", 48), ("value_proj", 32)):
            wanted |= layer(f"{at}.self_attn.{name}", rows, 32)
        wanted |= layer(f"{at}.self_attn.output_proj", 32, 32)
        wanted |= layer(f"{at}.ffn.layers.0.0", 24, 32) | layer(f"{at}.ffn.layers.1", 32, 24)
        wanted |= layer(f"{at}.norms.0", 32) | layer(f"{at}.norms.1", 32)
        at = f"transformer_decoder.layers.{i}"
        for name in ("self_attn", "cross_attn"):
            wanted |= {f"{at}.{name}.attn.in_proj_weight": (96, 32), f"{at}.{name}.attn.in_proj_bias": (96,)}
            wanted |= layer(f"{at}.{name}.attn.out_proj", 32, 32)
        wanted |= layer(f"{at}.ffn.layers.0.0", 40, 32) | layer(f"{at}.ffn.layers.1", 32, 40)
        wanted |= {k: v for n in range(3) for k, v in layer(f"{at}.norms.{n}", 32).items()}
    assert {k: tuple(v.shape) for k, v in small().state_dict().items()} == wanted


def test_works_under_autocast_with_losses_in_float32():
    head, maps = small(), random_maps()
    exact = next(head.outputs(maps))
    with torch.autocast("cpu", torch.bfloat16):
        found, scores, losses = next(head.outputs(maps)), head(maps), head.loss(maps, halves(5, 9))
    for one, other in zip(found, exact):  # later outputs differ where rounding lets a query look at another cell
        assert_close(one.float(), other, tolerance=0.03)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in (scores, *losses.values()))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


# ---- matching and losses --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_matching_is_the_cheapest_of_all_assignments(seed):
    torch.manual_seed(seed)
    logits, masks = torch.randn(4, 4), torch.randn(4, 6, 6)
    masks[:, 2:] += 6 * torch.randn(4, 1, 1)  # at ignored pixels
    labels = torch.randint(3, (1, 6, 6))
    labels[0, 2:] = 255
    target = targets_of(labels, 3)[0]
    torch.manual_seed(3)
    queries, targets = match(logits, masks, target, 50)
    torch.manual_seed(3)
    points = torch.rand(1, 50, 2)
    known = criterion.weights_at(target.labelled[None, None], points)[0, 0]
    values, inside = (criterion.at_points(m[None], points)[0] for m in (masks, target.masks))

    def cost(q, t):
        p, y = values[q].sigmoid(), inside[t]
        entropy = -(y * p.log() + (known - y) * (1 - p).log()).sum() / known.sum()
        dice = 1 - (2 * (p * y).sum() + 1) / ((p * known).sum() + y.sum() + 1)
        return (-2 * logits[q].softmax(0)[target.classes[t]] + 5 * entropy + 5 * dice).item()

    best = min(itertools.permutations(range(4), 3), key=lambda order: sum(map(cost, order, range(3))))
    assert {t: q for q, t in zip(queries.tolist(), targets.tolist())} == dict(enumerate(best))


def test_more_classes_than_queries_and_values_that_are_no_numbers_are_matched():
    target = targets_of(torch.arange(9).reshape(1, 3, 3), 9)[0]
    queries, targets = match(torch.randn(2, 10), torch.randn(2, 3, 3), target, 8)
    assert queries.tolist() == [0, 1] and len(set(targets.tolist())) == 2
    losses = set_losses([(torch.full((1, 2, 10), torch.nan), torch.randn(1, 2, 3, 3))], torch.zeros(1, 3, 3).long(), 8)
    assert losses["loss_cls"].isnan()


def perfect(labels, num_classes=3, queries=5, sure=30.0):
    """Logits that say what a label map says, class k by query k."""
    logits = torch.full((len(labels), queries, num_classes + 1), -sure)
    logits[..., num_classes] = sure
    masks = torch.full((len(labels), queries, *labels.shape[1:]), -sure)
    for b, image in enumerate(labels):
        for k in set(image.flatten().tolist()) - {255}:
            logits[b, k], logits[b, k, k] = -sure, sure
            masks[b, k] = torch.where(image == k, sure, -sure)
    return logits, masks


def framed():
    """Label maps with unlabelled pixels around and between the classes."""
    labels = halves(6, 9)
    labels[0, :, 5:7] = labels[1, :, 8:10] = 255
    labels[:, [0, 1, -2, -1]] = 255
    labels[:, :, [0, 1, -2, -1]] = 255
    return labels


def test_a_perfect_prediction_costs_nothing_and_ignored_pixels_never_count():
    labels = framed()
    logits, masks = perfect(halves(6, 9))
    losses = set_losses([(logits, masks)], labels, 400)
    assert all(0 <= v < 1e-2 for v in losses.values())
    worse = set_losses([(logits, torch.full_like(masks, -30.0))], labels, 400)
    assert worse["loss_mask"] > 50 and worse["loss_dice"] > 3
    deep = torch.zeros_like(masks, dtype=torch.bool)
    deep[:, :, 0] = deep[..., -1] = True  # more than one cell away from the labelled pixels
    for wrong in (-30.0, 0.0, 30.0):
        torch.manual_seed(2)
        changed = set_losses([(logits, masks.masked_fill(deep, wrong))], labels, 400)
        torch.manual_seed(2)
        assert changed == set_losses([(logits, masks)], labels, 400)
    masks = torch.randn_like(masks).requires_grad_()
    sum(set_losses([(logits, masks)], labels, 400).values()).backward()
    assert masks.grad[deep].abs().max() == 0 and masks.grad[~deep].abs().sum() > 0


def test_an_image_without_labels_adds_nothing():
    labels = halves(6, 9)
    labels[1] = 255
    logits, masks = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 16, 16, requires_grad=True)
    losses = set_losses([(logits, masks)], labels, 50)
    sum(losses.values()).backward()
    assert logits.grad[0].abs().sum() > 0 and masks.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().max() == 0 and masks.grad[1].abs().max() == 0
    with pytest.raises(InputError, match="no pixel of"):
        set_losses([(logits, masks)], torch.full_like(labels, 255), 50)


def test_queries_without_a_target_learn_none_with_a_tenth_of_the_weight():
    logits = torch.randn(1, 3, 3)
    target = Target(torch.tensor([1]), torch.ones(1, 4, 4), torch.ones(4, 4))
    found = criterion.class_loss(logits, [target], [(torch.tensor([2]), torch.tensor([0]))])
    each = cross_entropy(logits[0], torch.tensor([2, 2, 1]), reduction="none")
    assert torch.isclose(found, (0.1 * each[0] + 0.1 * each[1] + each[2]) / 1.2)


def test_points_are_where_masks_are_uncertain_and_labels_known():
    masks, labelled = torch.full((1, 1, 20, 20), 9.0), torch.ones(1, 1, 20, 20)
    masks[..., :5] = 0.1  # the left quarter and the right one are uncertain
    masks[..., 15:] = 0.1
    labelled[..., 15:] = 0
    x = important_points(masks, labelled, 200)[0, :, 0]
    assert x.shape == (200,) and (x[:150] < 0.3).float().mean() > 0.95  # of 600 candidates, 150 are in the left quarter
    assert 0.1 < (x[150:] > 0.75).float().mean() < 0.4  # the others are anywhere
    corners = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert criterion.weights_at(labelled, corners).tolist() == [[[1.0, 0.0]]]  # a border has its pixels' weight


def test_mask_losses_are_divided_by_the_masks_of_all_processes(monkeypatch):
    output, labels = (torch.randn(2, 5, 4), torch.randn(2, 5, 16, 16)), halves(6, 0)
    counts = []
    monkeypatch.setattr(criterion, "mean_over_processes", lambda v: counts.append(v.item()) or v)
    torch.manual_seed(4)
    alone = set_losses([output], labels, 50)
    assert counts == [3]  # class 0 is not in the second image
    monkeypatch.setattr(criterion, "mean_over_processes", lambda v: 2 * v)
    torch.manual_seed(4)
    together = set_losses([output], labels, 50)
    for name, share in (("loss_cls", 1), ("loss_mask", 0.5), ("loss_dice", 0.5)):
        assert_close(together[name], share * alone[name], name)


def test_outputs_of_all_layers_are_trained():
    outputs = [(torch.randn(2, 5, 4), torch.randn(2, 5, 16, 16)) for _ in range(2)]
    state = torch.random.get_rng_state()
    both = set_losses(outputs, halves(6, 9), 50)
    torch.random.set_rng_state(state)
    apart = [set_losses([o], halves(6, 9), 50) for o in outputs]
    for name, value in both.items():
        assert_close(value, apart[0][name] + apart[1][name], name)


def test_loss_falls_and_the_classes_are_found():
    head, labels = small(), halves(5, 10)
    maps = [labels[:, None, :: 2**i, :: 2**i] + torch.rand(1, d, 1, 1) for i, d in enumerate(CHANNELS)]
    optimizer = torch.optim.AdamW(head.parameters(), 2e-3)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        totals.append(sum(head.loss(maps, labels).values()))
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.6 * totals[0]
    assert (head(maps).argmax(1) == labels).float().mean() > 0.9


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(in_channels=[8, 8, 8]), "takes 4 maps, fine to coarse; in_channels has 3 entries"),
        (dict(width=48), "width must be a multiple of 32 and of heads=4, got 48"),
        (dict(heads=5), "and of heads=5, got 32"),
        (dict(queries=0), "queries must be 1 or more, got 0"),
        (dict(points=0), "points must be 1 or more, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Mask2FormerHead(**dict(num_classes=3, in_channels=CHANNELS, **SMALL) | changes)


def test_inputs_that_do_not_fit_are_refused():
    head, linked, maps = small(), small(linked_queries=True), random_maps()
    with pytest.raises(InputError, match=r"the maps have \[20, 16, 12, 8\] channels"):
        head(maps[::-1])
    with pytest.raises(InputError, match="has queries of its own; set linked_queries=True"):
        head(maps, torch.randn(8, 32))
    with pytest.raises(InputError, match="needs an adapter that offers queries"):
        linked.loss(maps, halves(5, 9))
    with pytest.raises(InputError, match=r"takes queries \(n, 32\), the adapter offers \(8, 16\)"):
        linked(maps, torch.randn(8, 16))
    with pytest.raises(InputError, match="a mask holds 3, the head has the classes 0 to 2"):
        head.loss(maps, torch.full((2, 16, 16), 3))
