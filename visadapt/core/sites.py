"""Sites: the places of a backbone where something can be attached, named by role instead of by module path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import InputError, hint

LINEAR_ROLES = ("q", "k", "v", "proj", "gate", "fc1", "fc2", "xq", "xk", "xv", "xproj")
"""Roles that `all-linear` stands for. The fused `qkv` is left out: its rows are already there as q, k and v."""

LINEARS = (*LINEAR_ROLES, "qkv")
"""Roles whose module is a linear."""

ROLES = (
    *LINEAR_ROLES,
    *("qkv", "attn", "mlp", "attn_res", "mlp_res", "block", "norm1", "norm2", "norm", "xattn"),
    *("patch", "conv", "stage", "down", "stem", "neck", "decoder", "memory"),
)
"""The whole vocabulary. `norm` is the norm after the last block."""


@dataclass(frozen=True)
class Site:
    """One place of a backbone.

    Attributes:
        path: module inside `backbone.body`, e.g. "blocks.3.attn.qkv".
        role: one of `ROLES`.
        layer: block index; -1 outside the blocks.
        dim_in: input width as this site sees it.
        dim_out: output width; a slice of a fused weight counts its own rows.
        rows: slice of a fused weight's output rows, or None for all of them.
        layout: what the module receives: NLC, NHWC, LNC or NCHW.
        batch_dim: where the batch stands in it.
        windows: the batch is split into windows, image-major.
        part: which sub-network the site belongs to.
        source: the module whose input is the `x` of this site, where that is not `path` itself.
        n: running number where a layer has several sites of one role.
    """

    path: str
    role: str
    layer: int
    dim_in: int
    dim_out: int
    rows: tuple[int, int] | None = None
    layout: str = "NLC"
    batch_dim: int = 0
    windows: bool = False
    part: str = "trunk"
    source: str | None = None
    n: int = 0

    @property
    def key(self) -> str:
        """Stable name without dots, unique in a backbone; the name of this site in adapter files."""
        layer = f"{self.layer:02d}" if self.layer >= 0 else "xx"
        return f"{self.part}_{layer}_{self.role}" + (f"_{self.n}" if self.n else "")


def _matches(site: Site, target: str) -> bool:
    if target == "all-linear":
        return site.role in LINEAR_ROLES
    if "*" in target or "." in target:
        return fnmatchcase(site.path, target)
    return site.role == target


def select(sites: Sequence[Site], targets: Iterable[str], layers: Iterable[int] | None, owner: str) -> list[Site]:
    """The sites that `targets` and `layers` name, in the backbone's order.

    Args:
        sites: what the backbone offers.
        targets: roles, "all-linear", or globs over module paths ("blocks.*.mlp.fc1").
        layers: block indices, negative ones from the end; None for all, with the sites outside the blocks.
        owner: who asks, for messages ("LoRA on TimmViT").

    Raises:
        InputError: a target or layer matches nothing; what exists is listed.
    """
    targets = tuple(targets)
    for target in targets:
        if not any(_matches(s, target) for s in sites):
            offered = sorted({s.role for s in sites})
            near = hint(target, offered)
            near = near if "did you mean" in near else ""
            raise InputError(f"{owner}: target '{target}' matches no site{near}; the roles are {', '.join(offered)}")
    chosen = [s for s in sites if any(_matches(s, t) for t in targets)]
    if layers is None:
        return chosen
    depth = 1 + max((s.layer for s in sites), default=-1)
    wanted = set()
    for layer in layers:
        if not -depth <= layer < depth:
            raise InputError(f"{owner}: layer {layer} does not exist; the backbone has the layers 0 to {depth - 1}")
        wanted.add(layer % depth)
    return [s for s in chosen if s.layer in wanted]
