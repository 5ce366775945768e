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

NORMS = ("norm1", "norm2", "norm")
"""Roles whose module is a norm; `norm` are those outside the blocks, mostly one after the last."""

CONVS = ("patch", "conv", "down")
"""Roles whose module is a convolution."""

WEIGHTS = (*LINEARS, *NORMS, *CONVS)
"""Roles whose module has a weight."""

ROLES = (
    *WEIGHTS,
    *("attn", "mlp", "attn_res", "mlp_res", "block", "xattn"),
    *("stage", "stem", "neck", "decoder", "memory"),
)
"""The whole vocabulary."""


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

    @property
    def channels(self) -> int:
        """The dimension of the module's input and output in which the channels stand."""
        return 1 if self.layout == "NCHW" else -1


def _matches(site: Site, target: str, whole: set[str]) -> bool:
    """Whether a target names a site; `whole` are the paths of modules that the backbone offers undivided."""
    if target == "all-linear":
        return site.role in LINEAR_ROLES
    if target == "all-norm":
        return site.role in NORMS
    if target == "all-weights":
        return site.role in WEIGHTS and (site.rows is None or site.path not in whole)
    if "*" in target or "." in target:  # a path names a module, not its slices as well
        return fnmatchcase(site.path, target) and (site.rows is None or site.path not in whole)
    return site.role == target


def select(sites: Sequence[Site], targets: Iterable[str], layers: Iterable[int] | None, owner: str) -> list[Site]:
    """The sites that `targets` and `layers` name, in the backbone's order.

    Args:
        sites: what the backbone offers.
        targets: roles, globs over module paths ("blocks.*.mlp.fc1"), "all-linear", "all-norm", or "all-weights": every
            linear, norm and convolution once, a fused qkv as one.
        layers: block indices, negative ones from the end; None for all, with the sites outside the blocks.
        owner: who asks, for messages ("LoRA on TimmViT").

    Raises:
        InputError: a target or layer matches nothing; what exists is listed.
    """
    targets = tuple(targets)
    whole = {s.path for s in sites if s.rows is None}
    for target in targets:
        if not any(_matches(s, target, whole) for s in sites):
            offered = sorted({s.role for s in sites})
            near = hint(target, offered)
            near = near if "did you mean" in near else ""
            raise InputError(f"{owner}: target '{target}' matches no site{near}; the roles are {', '.join(offered)}")
    chosen = [s for s in sites if any(_matches(s, t, whole) for t in targets)]
    if layers is None:
        return chosen
    depth = 1 + max((s.layer for s in sites), default=-1)
    wanted = set()
    for layer in layers:
        if not -depth <= layer < depth:
            raise InputError(f"{owner}: layer {layer} does not exist; the backbone has the layers 0 to {depth - 1}")
        wanted.add(layer % depth)
    found = [s for s in chosen if s.layer in wanted]
    if chosen and not found:
        named = ", ".join(f"'{t}'" for t in targets)
        raise InputError(f"{owner}: {named} match no site in the layers {sorted(wanted)}; leave layers away for them")
    return found
