"""`visadapt bench parameters`: trainable parameters of every method on a ViT-B, for `visadapt list adapters`."""

from __future__ import annotations

import json
from pathlib import Path

from ..adapters import VIT_B
from ..backbones.base import Backbone
from ..backbones.timm_vit import TimmViT
from ..core.adapted import Adapted
from ..core.adapter import Adapter
from ..errors import InputError
from ..files import atomic
from ..registry import ADAPTERS

MODEL = "vit_base_patch16_224"


def trainable(backbone: Backbone, adapter: Adapter) -> int:
    """Values that an adapter trains on a backbone, which is as before afterwards."""
    adapted = Adapted(backbone)
    adapted.add("main", adapter)
    adapted.set_trainable("main")
    count = adapted.trainable_report().trainable
    adapted.remove("main")
    return count


def write_parameters(path: Path = VIT_B) -> Path:
    """Count all methods on a ViT-B with random weights; those that need arguments are left out."""
    backbone, found = TimmViT(MODEL), {}
    for name in ADAPTERS.names():
        try:
            found[name] = trainable(backbone, ADAPTERS.build({"type": name}))
        except InputError as error:
            print(f"{name} is left out: {error}", flush=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return path
