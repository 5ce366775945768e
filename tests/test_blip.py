"""Blip: equal to transformers, to itself with and without a cache, and under attention cores of adapters."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from safetensors.torch import save_file

from visadapt.adapters.lora import LoRA
from visadapt.adapters.p_adapter import PAdapter
from visadapt.backbones.blip import PROMPT, Blip
from visadapt.core.adapted import Adapted
from visadapt.core.adapter import Adapter
from visadapt.core.kinds import AttnCore
from visadapt.core.sites import ROLES
from visadapt.errors import InputError
from visadapt.testing import assert_close, difference, noise, tiny_backbone

VOCAB, WIDTH, SEEN = 50, 32, 48
ARCH = dict(depth=2, embed_dim=SEEN, num_heads=3, img_size=32)
TEXT = dict(layers=2, width=WIDTH, heads=4, vocab=VOCAB, hidden=40, positions=20)
TINY = dict(type="Blip", arch=ARCH, text=TEXT, prompt=(1, 2, 3))


@functools.cache
def pristine():
    """A backbone that no test changes."""
    return tiny_backbone(TINY)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size or (32, 32), generator=torch.Generator().manual_seed(0))


def words(length, batch=2):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


# ---- transformers ----------------------------------------------------------------------------------------------------
@functools.cache
def reference():
    """A tiny BLIP for captions of transformers, with random values everywhere."""
    transformers = pytest.importorskip("transformers")
    text = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, encoder_hidden_size=SEEN, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=20, bos_token_id=45, eos_token_id=46, sep_token_id=46,
        pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=SEEN, intermediate_size=4 * SEEN, num_hidden_layers=2, num_attention_heads=3, image_size=32,
        patch_size=16, layer_norm_eps=1e-6, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = transformers.BlipForConditionalGeneration(config).eval()
    noise(model)
    return model


def state_of(model, layout):
    """Its weights under the names of transformers, or of BLIP's authors as far as the two differ."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if layout == "transformers":
        return state
    renamed = {}
    for key, value in state.items():
        for new, old in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
            ("layer_norm", "norm"),
        ):
            key = key.replace(new, old)
        renamed[key] = value
    renamed["text_decoder.bert.embeddings.position_ids"] = torch.arange(20)[None]
    return renamed


def converted(tmp_path, layout="transformers", **changes):
    path = tmp_path / "blip.pth"
    torch.save({"model": state_of(reference(), layout) | changes}, path)
    return Blip(**{k: v for k, v in TINY.items() if k != "type"}, weights=str(path)).eval()


@pytest.mark.parametrize("layout", ["transformers", "authors"])
@torch.no_grad()
def test_published_weights_give_the_scores_and_captions_of_transformers(layout, tmp_path):
    backbone, model = converted(tmp_path, layout), reference()
    assert backbone.weight_report.layout == "blip" and not backbone.weight_report.missing
    assert all("decoder." in name or "position_ids" in name for name in backbone.weight_report.dropped)
    ids = words(7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    theirs = model(pixel_values=images(), input_ids=ids, attention_mask=mask.long()).logits
    assert_close(backbone.logits(images(), ids, mask), theirs)
    begun = torch.tensor([[45, 7, 9], [45, 3, 11]])
    said = model.generate(
        pixel_values=images(), input_ids=torch.cat([begun, begun[:, :1]], 1), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(backbone.generate(images(), begun, 8)[:, : said.shape[1]], said)


def test_a_merged_file_is_read_again_and_untied_scores_are_refused(tmp_path):
    own = tmp_path / "own.safetensors"
    save_file({k: v.clone() for k, v in pristine().body.state_dict().items()}, own)
    again = Blip(arch=ARCH, text=TEXT, prompt=(1, 2, 3), weights=str(own)).eval()
    assert torch.equal(again(images()).native, pristine()(images()).native)
    with pytest.raises(InputError, match="differs from the word embeddings"):
        converted(tmp_path, **{"text_decoder.cls.predictions.decoder.weight": torch.zeros(VOCAB, WIDTH)})


# ---- text ------------------------------------------------------------------------------------------------------------
class Softmax(AttnCore):
    """The attention as it is, step by step; with `twice` another one."""

    def __init__(self, site, twice):
        super().__init__(site)
        self.twice = twice
        self.sizes = []

    def attend(self, q, k, v, bias, ctx):
        self.sizes.append((q.shape[2], k.shape[2]))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        probs = (scores if bias is None else scores + bias).softmax(-1)
        return (probs.square() if self.twice else probs) @ v


class Cores(Adapter):
    kinds = ("attention",)
    targets = ("attn", "xattn")
    needs = frozenset({"attention"})

    def __init__(self, twice=False, targets=None, layers=None):
        super().__init__(targets, layers)
        self.twice = twice

    def make(self, site, backbone, shared):
        return Softmax(site, self.twice)


def adapted_with(*adapters):
    adapted = Adapted(copy.deepcopy(pristine())).eval()
    for name, adapter in zip("ab", adapters):
        noise(adapted.add(name, adapter))
    return adapted


@torch.no_grad()
def test_a_plain_softmax_core_changes_nothing():
    adapted, ids = adapted_with(Cores()), words(6)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    assert_close(adapted.backbone.logits(images(), ids, mask), pristine().logits(images(), ids, mask))
    assert_close(adapted(images()).native, pristine()(images()).native)
    with adapted.disabled():
        assert torch.equal(adapted.backbone.logits(images(), ids), pristine().logits(images(), ids))


@pytest.mark.parametrize(
    "attached",
    [
        (),
        (Cores(twice=True), LoRA(rank=2, targets=("all-linear",))),
        (PAdapter(reduction=2, sample_len=3, targets=("text.*attn", "text.*.mlp")),),
    ],
    ids=("bare", "core", "p-adapter"),
)
@torch.no_grad()
def test_with_a_cache_and_without_texts_and_scores_are_the_same(attached):
    adapted = adapted_with(*attached)
    backbone, text = adapted.backbone, adapted.backbone.body.text
    full = backbone.generate(images(), words(3), 9, cached=False)
    assert torch.equal(backbone.generate(images(), words(3), 9), full) and full.shape == (2, 12)
    scores = backbone.logits(images(), full)
    assert torch.equal(scores[:, 2:-1].argmax(-1), full[:, 3:])
    assert (difference(scores, pristine().logits(images(), full)) > 1e-2) == bool(attached)
    image, cache = backbone._seen(images()), text.cache()
    for start, stop in ((0, 3), (3, 5), (5, 6), (6, 12)):  # several new words at once see each other in order
        hidden = text(full[:, start:stop], image if start == 0 else torch.full_like(image, torch.nan), cache=cache)
        assert_close(text.scores(hidden), scores[:, start:stop])


def test_a_core_sees_the_new_queries_and_all_keys():
    adapted = adapted_with(Cores(targets=("text.*.attn",)), Cores(targets=("text.*.xattn",)))
    adapted.backbone.generate(images(), words(3), 3)
    sizes = {name: next(iter(adapted.adapters[name].pieces.values())).sizes for name in "ab"}
    assert sizes == {"a": [(3, 3), (1, 4), (1, 5)], "b": [(3, 5), (1, 5), (1, 5)]}


@torch.no_grad()
def test_words_see_no_later_words_no_padding_and_the_image():
    backbone, ids = pristine(), words(6)
    scores = backbone.logits(images(), ids)
    other = ids.clone()
    other[:, 4] = (ids[:, 4] + 1) % VOCAB
    changed = backbone.logits(images(), other)
    assert torch.equal(changed[:, :4], scores[:, :4]) and difference(changed[:, 4:], scores[:, 4:]) > 1e-2
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert_close(backbone.logits(images(), ids, mask), scores)
    mask[:, 4] = False
    assert_close(backbone.logits(images(), other, mask)[:, 5], backbone.logits(images(), ids, mask)[:, 5])
    assert difference(backbone.logits(-images(), ids), scores) > 1e-2


@torch.no_grad()
def test_a_text_ends_with_its_end_word():
    backbone = pristine()
    free = backbone.generate(images(), words(3), 10)
    end = int(free[0, 5])
    ended = backbone.generate(images(), words(3), 10, end=end)
    for row, text in zip(ended, free):
        last = next((n for n in range(3, 13) if text[n] == end), 12)
        assert torch.equal(row[: last + 1], text[: last + 1][: len(row)]) and (row[last + 1 :] == end).all()


# ---- a backbone like others ------------------------------------------------------------------------------------------
def test_features_depend_on_both_parts_and_sites_tell_them_apart():
    backbone = pristine()
    features, tower = backbone(images(32, 48)), backbone.tower(images(32, 48))
    assert torch.equal(features.tokens, tower.tokens) and torch.equal(features.cls, tower.cls)
    assert features.native.shape == (2, backbone.pooled_dim("native")) == (2, WIDTH)
    assert backbone.pooled_dim("cls_avg") == 2 * SEEN
    sites = backbone.sites()
    assert len({s.key for s in sites}) == len(sites) and {s.role for s in sites} <= set(ROLES)
    for site in sites:
        module = backbone.body.get_submodule(site.path)
        assert site.part == ("text" if site.path.startswith("text.") else "trunk")
        if isinstance(module, torch.nn.Linear) and site.rows is None:
            assert (site.dim_in, site.dim_out) == (module.in_features, module.out_features)
        if site.source:
            backbone.body.get_submodule(site.source)
        if site.role in ("attn", "xattn"):
            assert backbone.attention(site.path).module is module
    linears = {n for n, m in backbone.body.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears - {s.path for s in sites} == {"text.answer"}
    with pytest.raises(InputError, match=r"text.blocks.0.mlp: no attention view for Mlp"):
        backbone.attention("text.blocks.0.mlp")


def test_layers_of_the_decoder_lie_beyond_the_blocks():
    layer_id = pristine().layer_id
    names = ("vision.cls_token", "vision.blocks.1.norm1.weight", "vision.norm.bias", "text.blocks.0.attn.q.weight")
    assert [layer_id(name) for name in names] == [0, 2, 3, 3]


def test_copies_keep_tower_and_body_together():
    for other in (copy.deepcopy(pristine()), pickle.loads(pickle.dumps(pristine()))):
        assert other.tower.body is other.body.vision and other.tower.ctx is other.ctx
        assert torch.equal(other(images()).native, pristine()(images()).native)
        assert other.double()(images().double()).native.dtype == torch.float64
    assert [n for n in pristine().state_dict() if not n.startswith("body.")] == []


def test_an_image_seen_before_is_forgotten():
    adapted = adapted_with(LoRA(rank=2))
    adapted(images(64, 64))
    adapted.backbone.logits(images(), words(3))
    assert adapted.ctx.grid == (2, 2)
    adapted.ctx.values["side"] = 1
    adapted.backbone.logits(adapted.ctx.image, words(3))
    assert adapted.ctx.values["side"] == 1


@pytest.mark.compile
def test_scores_compile_as_one_graph():
    adapted, mask = adapted_with(Cores(twice=True)), torch.ones(2, 4, dtype=torch.bool)
    torch.compiler.reset()
    compiled = torch.compile(adapted.backbone.logits, backend="eager", fullgraph=True)
    assert_close(compiled(images(), words(4), mask), adapted.backbone.logits(images(), words(4), mask))


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (words(3, batch=3), None, r"2 images need words of shape \[2, L\] of int64, got \[3, 3\] of int64"),
        (words(3)[0], None, r"got \[3\] of int64"),
        (words(3)[:, :0], None, r"got \[2, 0\] of int64"),
        (words(3).float(), None, "of float32"),
        (words(21), None, "texts of 21 words; the decoder has 20 positions"),
        (words(3) + 48, None, "numbers from 0 to 49, got"),
        (words(3) - 50, None, "numbers from 0 to 49, got"),
        (words(3), torch.ones(2, 4, dtype=torch.bool), r"the mask is \[2, 4\] of bool; words of shape \[2, 3\]"),
        (words(3), torch.ones(2, 3), "of float32"),
        (words(3), torch.arange(3).expand(2, 3) > 0, "hides the first word"),
    ],
)
def test_wrong_words_and_masks(ids, mask, message):
    with pytest.raises(InputError, match=message) as caught:
        pristine().logits(images(), ids, mask)
    assert "\n" not in str(caught.value)


def test_generation_beyond_the_last_position_is_refused():
    assert pristine().generate(images(), words(3), 17).shape == (2, 20)
    with pytest.raises(InputError, match="texts of 21 words"):
        pristine().generate(images(), words(3), 18)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text=dict(depth=2)), "Blip: text: TextDecoder has no argument 'depth'"),
        (dict(text=dict(layers="2")), "Blip: text: TextDecoder takes layers as int"),
        (dict(text=dict(image_width=3)), "leave it out"),
        (dict(text=dict(TEXT, heads=5)), "width 32 is no multiple of its 5 heads"),
        (dict(text=dict(TEXT, vocab=0)), "vocab must be at least 1"),
        (dict(prompt=(1,)), "at least 2 words"),
        (dict(prompt=PROMPT), "from 0 to 49, got 1037 to 30522"),
        (dict(weights="nowhere.pth"), "there is no file"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(InputError, match=message):
        Blip(**{**dict(arch=ARCH, text=TEXT, prompt=(1, 2)), **changes})
