"""p-adapter: attention as a graph on which p-Laplacian messages pass, and a bottleneck beside the MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.inject import Output
from ..core.kinds import AttnCore, SiteModule, Tokens
from ..core.products import through
from ..core.progress import Progress
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS
from ._common.bottleneck import Bottleneck
from ._common.laplacian import LaplacianSums


def _as_bert(module: nn.Module) -> None:
    """Start all linears as BERT does: weights normal with deviation 0.02, biases zero."""
    for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


def attention_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """q k^T / sqrt(head_dim), (B, H, q, k); `bias` as F.scaled_dot_product_attention takes it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if bias is None:
        return scores
    lowest = torch.finfo(scores.dtype).min  # and not -inf, with which a row that is masked throughout would be NaN
    if bias.dtype == torch.bool:
        return scores.masked_fill(~bias, lowest)
    return scores + bias.clamp(min=lowest)


def pool_keys(x: Tensor, length: int) -> Tensor:
    """Adaptive average pooling of the last dimension of (B, H, n, k) to `length`."""
    return F.adaptive_avg_pool1d(x.flatten(0, 1), length).unflatten(0, x.shape[:2])


class LaplacianAttention(AttnCore):
    """Attention, and what the messages among its nodes add behind its output projection."""

    def __init__(self, site: Site, options: PAdapter) -> None:
        super().__init__(site)
        width = site.dim_out // options.reduction
        self.inner, self.gate = nn.Linear(site.dim_out, width), nn.Linear(site.dim_out, width)
        self.up = nn.Linear(width, site.dim_out)
        _as_bert(self)
        self.p, self.m = nn.Parameter(torch.tensor(float(options.p))), nn.Parameter(torch.tensor(0.0))
        self.mu0, self.loops = options.mu0, not options.mask_self_loops
        self.cross = site.role == "xattn"
        self.length = options.sample_len if self.cross else None
        self.beta = options.beta_cross or not self.cross

    def run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, output: Output, ctx: Context) -> Tensor:
        scores = attention_scores(q, k, bias)
        if not self.cross:
            f, sums, o = self.gather(output.then(self.inner, v), scores, v)
            return self.mix(output(o), f, sums)
        probs = scores.softmax(-1)
        h = output(probs.to(v.dtype) @ v)
        if self.length is not None:
            probs, v = pool_keys(probs, self.length), pool_keys(v.mT, self.length).mT
        return self.mix(h, *self.gather(output.then(self.inner, torch.cat([q, v], 2)), probs))

    def gather(self, nodes: Tensor, attention: Tensor, v: Tensor | None = None) -> tuple[Tensor, ...]:
        """Messages and weights that the queries get, and what attention makes of v.

        Args:
            nodes: W_i P X: queries and then values (B, q + k, width) in cross-attention, else values (B, k, width).
            attention: after softmax, with v before it, (B, H, q, k); in self-attention the queries are the last q of
                the k nodes.
            v: (B, H, k, d) or None.

        Returns:
            Features of the queries (B, H, q, c), sums (B, H, q, c + 1), and, with v, what attention makes of it.
        """
        (batch, heads, q, k), work = attention.shape, self.work
        with torch.autocast(attention.device.type, enabled=False):
            f = nodes.to(work).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
            fq, fv = f.split([q, k], 1) if self.cross else (f[:, -q:], f)
            given = attention.to(work).flatten(0, 1), fq, fv, self.p.to(work), not self.cross, self.loops
            found = [LaplacianSums.apply(*given)] if v is None else LaplacianSums.apply(*given, v.flatten(0, 1))
        return tuple(x.unflatten(0, (batch, heads)) for x in (fq, *found))

    def mix(self, h: Tensor, fq: Tensor, sums: Tensor) -> Tensor:
        """The attention's output h (B, q, D) with what is added to it."""
        dtype = self.up.weight.dtype
        with torch.autocast(h.device.type, enabled=False):
            given, floor = sums[..., :-1], 2 * self.mu0 * (2 + self.m.to(self.work).tanh()) / self.p.to(self.work)
            if self.beta:
                given = given + floor * fq
            mixed = (given / (sums[..., -1:] + floor)).transpose(1, 2).flatten(2)
            change = F.gelu(through(self.gate, h.to(dtype))) * mixed.to(dtype)
            return h + through(self.up, change).to(h.dtype)

    @property
    def work(self) -> torch.dtype:
        """float32 or more: powers of small distances leave half precision."""
        return torch.promote_types(self.up.weight.dtype, torch.float32)


class ParallelFFN(Tokens):
    """y' = y + U2 ReLU(U1 x), x (..., D) being the input of the MLP and y its output."""

    position = "parallel"

    def __init__(self, site: Site, width: int) -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site.dim_in, width, nn.ReLU())
        _as_bert(self)

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.bottleneck(x)


@ADAPTERS.register_module()
class PAdapter(Adapter):
    """Every attention gets what one step of p-Laplacian message passing on its own graph gives.

    With h the output of an attention A (after softmax, per head), its frozen output projection P, nodes X and e = 1e-8:

        F = W_i P(X),    g_ij = ||sqrt(A_ij + e) (F_j - F_i) + e||^(p - 2),    Abar = A g,
        mu = mu0 (2 + tanh m),    alpha_i = 1 / (sum_j Abar_ij + 2 mu / p),    beta_i = alpha_i 2 mu / p,
        Fo_i = alpha_i sum_j Abar_ij F_j + beta_i F_i,    h + W_o (GELU(W_g h) Fo)

    F has c = D / (reduction heads) channels per head. Within one sequence (role `attn`) the nodes are the values; with
    a cache of them, where there are fewer queries than values, queries are the last nodes, so that generation gives
    what training does. (The official code takes the other form there.) Between sequences (role `xattn`) the graph is
    bipartite, from queries to values, which are pooled to `sample_len` nodes before; the official code has no beta
    there, the paper's equation has: `beta_cross`.

    In the first form every node is its own neighbour, with a weight of about 1e4 to 1e6 for p < 2, which swamps all
    others: `mask_self_loops` drops these, which makes it another function. The MLP gets U2 ReLU(U1 x) in parallel,
    with an inner width of D / reduction.

    All this is in the dtype of the parameters, float32 under autocast. p learns without bounds and must stay above 0;
    a step that takes it out of there is an error. Trained values of BERT-base: 222,146 per attention and 148,320 per
    MLP, in BLIP's decoder of 12 layers with both attentions 7,111,344. Weights start normal with a deviation of 0.02,
    so that a fresh adapter changes the outputs slightly.

    Args:
        p: at the start, the published values are 1.75 for captions, 1.25 for VQA, 1.5 for SNLI-VE.
        mu0: scale of mu, 10 for SNLI-VE.
        reduction: D over inner width.
        sample_len: nodes that the values of cross-attention are pooled to, 16 for VQA; all of them where None.
        mask_self_loops: no messages from a node to itself.
        beta_cross: keep beta in cross-attention.
        targets: roles; add "xattn" where the backbone has it.
        layers: block indices.
    """

    kinds = ("attention", "tokens")
    targets = ("attn", "mlp")
    roles = ("attn", "xattn", "mlp")
    needs = frozenset({"attention"})
    paper = "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models, arXiv 2312.10613"
    identity_at_init = False

    def __init__(
        self,
        p: float = 1.75,
        mu0: float = 0.1,
        reduction: int = 8,
        sample_len: int | None = 24,
        mask_self_loops: bool = False,
        beta_cross: bool = False,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_strength(p=p, mu0=mu0)
        self.require_positive(reduction=reduction, **({} if sample_len is None else {"sample_len": sample_len}))
        self.p, self.mu0, self.reduction, self.sample_len = p, mu0, reduction, sample_len
        self.mask_self_loops, self.beta_cross = mask_self_loops, beta_cross

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> SiteModule:
        if site.role == "mlp":
            return ParallelFFN(site, max(1, site.dim_in // self.reduction))
        heads = backbone.attention(site.path).module.num_heads
        if site.dim_out % (self.reduction * heads):
            raise InputError(
                f"PAdapter: width {site.dim_out} of {site.path} is no multiple of reduction * heads = "
                f"{self.reduction} * {heads}; choose another reduction"
            )
        return LaplacianAttention(site, self)

    def on_update(self, progress: Progress) -> None:
        found = {piece.site.path: piece.p.detach() for piece in self.pieces.values() if piece.kind == "attention"}
        if not found or bool((values := torch.stack([*found.values()])).gt(0).all()):
            return
        path, value = next((path, v) for path, v in zip(found, values.tolist()) if not v > 0)
        raise InputError(
            f"PAdapter: p at {path} is {value:.3g} after this step and must stay above 0; lower the learning rate or "
            "the weight decay, or start with a larger p"
        )
