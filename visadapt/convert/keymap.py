"""What a published checkpoint layout is: how to recognise it and how to rename it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import SimpleNamespace

from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class KeyMap:
    """One published layout.

    Attributes:
        name: what reports and messages call it.
        example: two or three keys by which a reader knows it.
        matches: whether a state dict has this layout; looks at keys only.
        apply: (state, model) -> (state in timm's layout, names of the tensors left out). It may not change its input.
    """

    name: str
    example: str
    matches: Callable[[State], bool]
    apply: Callable[[State, nn.Module], tuple[State, list[str]]]


def timm_keys(state: State, patch_key: str, model: nn.Module) -> State:
    """Keys as timm's own converter renames them; no tensor is resized.

    The converter would also resample patches and positions to the model without a word. It is shown a model that has
    the file's patch size and no positions, so that sizes are compared, and reported, in one place by the caller.
    """
    patches = SimpleNamespace(proj=SimpleNamespace(weight=state[patch_key]))
    shown = SimpleNamespace(patch_embed=patches, pos_embed=None, head=getattr(model, "head", None))
    return checkpoint_filter_fn(dict(state), shown)


def listed(names: Collection[str], limit: int = 4) -> str:
    """The first few names for a message, and how many there are."""
    first = ", ".join(map(str, list(names)[:limit]))
    return f"{first}, … ({len(names)} in all)" if len(names) > limit else first
