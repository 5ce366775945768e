"""Visual prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.kinds import Prompt
from ..core.sites import Site
from ..errors import InputError
from ..registry import ADAPTERS


class PromptTokens(Prompt):
    """n learned tokens (n, D), the same for every image; dropout is drawn per image."""

    def __init__(self, site: Site, count: int, deep: bool, dropout: float, bound: float) -> None:
        super().__init__(site)
        self.tokens = nn.Parameter(torch.empty(count, site.dim_in).uniform_(-bound, bound))
        self.deep, self.dropout = deep, dropout

    @property
    def count(self) -> int:
        return self.tokens.shape[0]

    def forward(self, batch: int) -> Tensor:
        return F.dropout(self.tokens.expand(batch, -1, -1), self.dropout, self.training)


@ADAPTERS.register_module()
class VPT(Adapter):
    """Learned tokens between the class token and the patches.

    Deep: every block gets its own tokens, and they are taken out behind it. Shallow: tokens enter at the first block
    and travel to the end. They start uniform in ±sqrt(6 / (C p² + D)), C bands, patch p. A fresh adapter changes the
    output, since every token attends to the prompts.

    Args:
        count: tokens n per block.
        deep: at every block rather than at the first.
        dropout: on the tokens, in training.
        layers: blocks of deep prompts; the one block of shallow prompts (the first where None).
    """

    kinds = ("prompt",)
    targets = ("block",)
    roles = ("block",)
    needs = frozenset({"tokens", "prompts"})
    paper = "Visual Prompt Tuning (Jia et al., 2022), arXiv 2203.12119"
    identity_at_init = False

    def __init__(
        self, count: int = 10, deep: bool = True, dropout: float = 0.0, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(layers=(0,) if layers is None and not deep else layers)
        self.require_positive(count=count)
        if not deep and len(self.layers) != 1:
            raise InputError(
                f"VPT: shallow prompts enter at one block, got layers={list(self.layers)}; or set deep=True"
            )
        self.require_rate(dropout=dropout)
        self.count, self.deep, self.dropout = count, deep, dropout

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> PromptTokens:
        bound = math.sqrt(6 / (backbone.in_chans * backbone.patch**2 + site.dim_in))
        return PromptTokens(site, self.count, self.deep, self.dropout, bound)
