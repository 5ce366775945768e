"""Full fine-tuning, of the whole network or of some blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.adapter import Adapter
from ..registry import ADAPTERS


@ADAPTERS.register_module()
class FullFineTune(Adapter):
    """The parameters of the backbone themselves train; the upper bound that adapters are measured against.

    The trained values stand in the network while the adapter is enabled, and the originals come back when it is
    disabled or removed. Its file is as large as what trains.

    Args:
        layers: block indices, negative from the end; None for every parameter, with those outside the blocks.
    """

    kinds = ()
    targets = ()
    mergeable = True
    trains_base = True
    zero_grad = (".k.bias",)
    paper = "a practice rather than a method"

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers=layers)

    def base_parameters(self, backbone) -> list[str]:
        names = [name for name, _ in backbone.body.named_parameters()]
        if self.layers is None:
            return names
        wanted = {layer % backbone.depth + 1 for layer in self.layers}
        return [name for name in names if backbone.layer_id(name) in wanted]
