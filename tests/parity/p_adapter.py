"""p-adapter in the attention outputs and in the MLP output of a small BERT."""

from __future__ import annotations

from torch import Tensor, nn

from visadapt.adapters.p_adapter import PAdapter
from visadapt.backbones.base import Backbone
from visadapt.core.adapted import Adapted
from visadapt.core.sites import Site


class Attention(nn.Module):
    """BERT's attention with its output projection; it is its own view."""

    def __init__(self, width, context_width, num_heads):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)
        self.dense, self.num_heads = nn.Linear(width, width), num_heads

    @property
    def module(self):
        return self

    def project(self, x: Tensor, context: Tensor | None = None):
        context = x if context is None else context
        projected = self.query(x), self.key(context), self.value(context)
        return *(p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected), None

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.dense(o.transpose(1, 2).flatten(2))

    def linear(self):
        return self.dense

    def forward(self, x, context=None):
        q, k, v, bias = self.project(x, context)
        return self.output(nn.functional.scaled_dot_product_attention(q, k, v, bias), x)


class FFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.inner, self.dense = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.dense(nn.functional.gelu(self.inner(x)))


class Layer(Backbone):
    """One layer of BLIP's decoder: sub-layers only, the norms and sums around them are the caller's."""

    capabilities = frozenset({"attention"})

    def __init__(self, width=32, heads=4, context_width=32, hidden=64):
        super().__init__()
        attentions = {"attn": Attention(width, width, heads), "xattn": Attention(width, context_width, heads)}
        self.body = nn.ModuleDict(attentions | {"mlp": FFN(width, hidden)})
        self.width = width

    def sites(self):
        return [Site(role, role, 0, self.width, self.width) for role in self.body]

    def attention(self, path):
        return self.body[path]


NAMES = {
    **{f"text_laplacian_adapter_{t}": o for t, o in dict(i="inner", gate="gate", o="up").items()},
    **{"laplacian_adapter_p": "p", "laplacian_adapter_mu": "m"},
    **{"text_ffn_adapter.0": "bottleneck.down", "text_ffn_adapter.2": "bottleneck.up"},
}
"""Official names of an adapter's parts, and ours."""


def ours(name):
    stem = next((s for s in NAMES if name == s or name.startswith(f"{s}.")), None)
    return stem and NAMES[stem] + name.removeprefix(stem)


def attached(kit, role, prefix=""):
    """A layer with the kit's adapter at one role, the piece there, and the official names of its values."""
    args = kit.args
    options = {name: args[name] for name in ("mu0", "reduction") if name in args}
    sizes = dict(heads=args.get("heads", 4), context_width=args.get("encoder_width", 32))
    adapted = Adapted(Layer(args["hidden_size"], hidden=args.get("intermediate", 64), **sizes))
    adapter = adapted.add("a", PAdapter(**options, sample_len=args.get("image_sample_len"), targets=[role]))
    adapted.set_trainable("a")
    (piece,) = adapter.pieces.values()
    names = {n.removeprefix(prefix): n for n in kit.group("param") if ours(n.removeprefix(prefix))}
    names = {ours(short): full for short, full in names.items()}
    given = {k: kit.group("param")[n] for k, n in names.items()}
    piece.load_state_dict({k: v.view(()) if k in ("p", "m") else v for k, v in given.items()})
    return adapted, piece, names


def closed(kit, y, residual, piece, names, prefix=""):
    """The post-norm behind a sub-layer, and the backward pass."""
    norm = [kit.group("param")[f"{prefix}LayerNorm.{leaf}"] for leaf in ("weight", "bias")]
    out = nn.functional.layer_norm(y + residual, y.shape[-1:], *norm, eps=1e-12)
    (out * kit.group("in")["cotangent"]).sum().backward()
    gradients = {n: piece.get_parameter(k).grad for k, n in names.items()}
    return {"y": out}, {n: g.view(1) if g.ndim == 0 else g for n, g in gradients.items()}


def linear(kit, name, x):
    return nn.functional.linear(x, *(kit.group("param")[f"{name}.{leaf}"] for leaf in ("weight", "bias")))


def graph(kit):
    """The part behind the projection, from a given attention and given nodes."""
    fed, q = kit.group("in"), kit.args["q"]
    cross = "k" in kit.args
    _, piece, names = attached(kit, "xattn" if cross else "attn")
    h, nodes = linear(kit, "dense", fed["context"]), linear(kit, "dense", fed["nodes"])
    probs = fed["attn"][:, :, :q, q:] if cross else fed["attn"]
    return closed(kit, piece.mix(h, *piece.gather(piece.inner(nodes), probs)), fed["residual"], piece, names)


def ffn(kit):
    fed = kit.group("in")
    _, piece, names = attached(kit, "mlp")
    y = piece(fed["residual"], linear(kit, "dense", fed["hidden"]), None)
    return closed(kit, y, fed["residual"], piece, names)


def cross_attention(kit):
    """The whole attention, attached to a network."""
    fed = kit.group("in")
    adapted, piece, names = attached(kit, "xattn", "output.")
    body = adapted.backbone.body["xattn"]
    paths = {"query": "self.query", "key": "self.key", "value": "self.value", "dense": "output.dense"}
    base = {f"{o}.{leaf}": kit.group("param")[f"{n}.{leaf}"] for o, n in paths.items() for leaf in ("weight", "bias")}
    body.load_state_dict(base)
    return closed(kit, body(fed["text"], fed["image_tokens"]), fed["text"], piece, names, "output.")


BUILDERS = {
    "padapter_cross": graph,
    "padapter_self": graph,
    "padapter_ffn": ffn,
    "padapter_crossattn_full": cross_attention,
}
