"""The frozen backbone as it is."""

from __future__ import annotations

from ..core.adapter import Adapter
from ..registry import ADAPTERS


@ADAPTERS.register_module()
class LinearProbe(Adapter):
    """Nothing is attached: only the head trains. The baseline that every method has to beat.

    An adapter file of it holds the heads alone. Its features never change, so they can be computed once.
    """

    kinds = ()
    targets = ()
    paper = "a practice rather than a method; studied by Alain and Bengio, 2016, arXiv 1610.01644"

    def __init__(self) -> None:
        super().__init__()
