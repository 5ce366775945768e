"""Attention views: the projections and the output of an attention without its softmax core."""

from __future__ import annotations

from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.layers.attention import resolve_self_attn_mask
from timm.models.eva import EvaAttention
from torch import Tensor, cat, nn

from ..core.products import through
from ..errors import InputError


class TimmAttentionView:
    """View of timm's Attention, AttentionRope and EvaAttention, fused or split.

    Args:
        module: the attention; kept by reference, and what is attached to its submodules takes part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def project(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B, heads, L, head_dim) after q/k norms and rotary positions, and the additive mask or None."""
        m = self.module
        b, n, _ = x.shape
        if getattr(m, "qkv", None) is not None:
            qkv = through(m.qkv, x)
            if getattr(m, "q_bias", None) is not None:
                qkv = qkv + cat((m.q_bias, m.k_bias, m.v_bias))
            q, k, v = qkv.reshape(b, n, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            projected = (through(p, x) for p in (m.q_proj, m.k_proj, m.v_proj))
            q, k, v = (y.reshape(b, n, -1, m.head_dim).transpose(1, 2) for y in projected)
        q, k = m.q_norm(q), m.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        if (groups := getattr(m, "num_kv_groups", 1)) > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v, resolve_self_attn_mask(n, q, attn_mask, is_causal)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        lead = self.module.num_prefix_tokens
        half = getattr(self.module, "rotate_half", False)
        return cat([x[:, :, :lead], apply_rot_embed_cat(x[:, :, lead:], rope, half=half)], dim=2)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """(B, heads, L, head_dim) to the attention's output; `x` is its input (for gated attention)."""
        m = self.module
        y = m.norm(o.transpose(1, 2).flatten(2))
        if getattr(m, "gate", None) is not None:
            y = y * through(m.gate, x).sigmoid()
        return m.proj_drop(through(m.proj, y))

    def linear(self) -> nn.Linear | None:
        """What `output` is, behind the heads side by side; None where there is more to it."""
        m = self.module
        more = getattr(m, "gate", None) is not None or (m.training and m.proj_drop.p > 0)
        return None if more or not isinstance(m.norm, nn.Identity) else m.proj


def has_attention_view(module: nn.Module) -> bool:
    """Whether the core of an attention is one softmax, as the view says; not so in differential attention."""
    return type(module) in (Attention, AttentionRope, EvaAttention)


def timm_attention_view(module: nn.Module, path: str) -> TimmAttentionView:
    """A view of `module`.

    Raises:
        InputError: the attention is built in a way the view does not know.
    """
    if not has_attention_view(module):
        raise InputError(f"{path}: no attention view for {type(module).__module__}.{type(module).__name__}")
    return TimmAttentionView(module)
