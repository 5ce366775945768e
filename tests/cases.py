"""What the conformance suite runs: every adapter on every tiny backbone that has what it needs.

`visadapt list` reads this file without importing it: names and capabilities are literals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "vit": {
        "type": "TimmViT",
        "name": "test_vit",
        "arch": dict(depth=2, embed_dim=48, num_heads=3, img_size=32, patch_size=14),
    },
    "dinov2": {
        "type": "TimmViT",
        "name": "vit_small_patch14_reg4_dinov2",
        "arch": dict(depth=2, embed_dim=48, num_heads=3, img_size=28, init_values=1.0),
    },
    "clip": {
        "type": "TimmViT",
        "name": "vit_base_patch16_clip_quickgelu_224",
        "arch": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
    },
    "eva02": {
        "type": "TimmViT",
        "name": "eva02_tiny_patch14_224",
        "arch": dict(depth=2, embed_dim=48, num_heads=3, img_size=28),
    },
    "convnext": {
        "type": "TimmConv",
        "name": "convnext_tiny",
        "arch": dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), ls_init_value=1.0),
    },
    "dscf": {"type": "DSCF", "channels": 6, "blocks": 2, "upscale": 2},
    "blip": {
        "type": "Blip",
        "vision": "vit_base_patch16_224",
        "arch": dict(depth=2, embed_dim=48, num_heads=3, img_size=32),
        "text": dict(layers=2, width=48, heads=3, vocab=50, hidden=64, positions=20),
        "prompt": (1, 2, 3),
    },
    "resnet": {
        "type": "TimmConv",
        "name": "test_resnet",
        "arch": dict(channels=(8, 8, 4, 16), stem_width=4, avg_down=False),
    },
}
"""Tiny backbones, the plain ViT first, what is least like it last.

LayerScale starts at 1: DINOv2's 1e-5 would hide every effect.
"""

CAPABILITIES: dict[str, tuple[str, ...]] = {
    "vit": ("attention", "maps", "prompts", "tokens"),
    "dinov2": ("attention", "maps", "prompts", "tokens"),
    "clip": ("attention", "maps", "prompts", "tokens"),
    "eva02": ("attention", "maps", "tokens"),
    "convnext": ("maps",),
    "dscf": ("maps",),
    "blip": ("attention", "prompts", "tokens"),
    "resnet": ("maps",),
}
"""What they offer, for readers that build nothing; a test compares it with the backbones."""

ROLES: dict[str, str] = {
    "vit": "attn attn_res block fc1 fc2 k mlp mlp_res norm norm1 norm2 patch proj q qkv stem v",
    "dinov2": "attn attn_res block fc1 fc2 k mlp mlp_res norm norm1 norm2 patch proj q qkv stem v",
    "clip": "attn attn_res block fc1 fc2 k mlp mlp_res norm norm1 norm2 patch proj q qkv stem v",
    "eva02": "attn attn_res block fc1 fc2 k mlp mlp_res norm norm1 norm2 patch proj q qkv stem v",
    "convnext": "block conv down fc1 fc2 mlp norm norm1 patch stage stem",
    "dscf": "block conv patch",
    "blip": "attn attn_res block fc1 fc2 k mlp mlp_res norm norm1 norm2 patch proj q qkv stem v xattn xk xproj xq xv",
    "resnet": "block conv down norm norm1 patch stage",
}
"""Roles of their sites, likewise."""


@dataclass(frozen=True)
class Case:
    """One way to use an adapter.

    Attributes:
        adapter: registered name.
        arguments: of its constructor.
        kit: parity kit that covers it, by the `kit` field of its JSON.
        trains: False for adapters without a single trainable value.
        frames: images per clip.
        steps: training steps after which every parameter must have had a gradient; more for methods that draw.
        extra: package it needs beyond the required ones.
    """

    adapter: str
    arguments: dict[str, Any] = field(default_factory=dict)
    kit: str | None = None
    trains: bool = True
    frames: int = 1
    steps: int = 3
    extra: str | None = None

    def __str__(self) -> str:
        shown = [f"{k}={'+'.join(v) if isinstance(v, tuple) else v}" for k, v in self.arguments.items()]
        return f"{self.adapter}({','.join(shown)})".replace(" ", "")


CASES = [
    Case("AdaptFormer", dict(width=4)),
    Case("BiAdaptFormer", dict(width=4, bits=2), kit="petl_adaptformer"),
    Case("BiLoRA", dict(rank=3, targets=("q", "proj", "fc2")), kit="petl_lora"),
    Case("BitFit"),
    Case("CloudAdapter", dict(width=8, rank=2), kit="cloud_adapter"),
    Case(
        "CloudAdapter", dict(width=8, rank=None, perception="convnext", context="levels"), kit="cloud_adapter_convnext"
    ),
    Case("CloudAdapter", dict(width=8, interaction="gate", global_groups=2), kit="cloud_adapter_pmaaint"),
    Case(
        "CloudAdapter", dict(width=8, rank=2, context="last", depth=3, pool=True, stem=False), kit="cloud_adapter_spm"
    ),
    Case("CoLoRA", dict(budget=0.2, targets=("q", "fc2", "patch"))),
    Case("ConvBranch", dict(width=8)),
    Case("ConvLoRA", dict(rank=2, targets=("q", "fc2", "patch")), kit="dscf_conv"),
    Case("ConvLoRA", dict(rank=2, targets=("patch", "down"))),
    Case("Convpass", dict(width=4)),
    Case("DiffoRA", dict(rank=2, targets=("q", "fc2"))),
    Case("DiffuseKronA", dict(a1=4, a2=8, targets=("q", "proj", "fc2")), kit="diffusekrona"),
    Case("DiffuseKronA", dict(a1=8, a2=2, order="kron", targets=("fc1", "fc2"))),
    Case("DyLoRA", dict(rank=3, targets=("q", "fc2")), kit="dylora"),
    Case("DyLoRA", dict(rank=3, frozen=True, dropout=0.5, targets=("q", "fc2"))),
    Case("EarthAdapter", dict(width=3, fft_layers=[-1], cutoff=1.0), kit="earth_adapter_small"),
    Case("EarthAdapter", dict(width=3, fft_layers=[-1], cutoff=1.0, token_width=2, token_grid=[2, 2])),
    Case("FullFineTune"),
    Case("Houlsby", dict(width=4)),
    Case("Hydra", dict(targets=("q", "proj", "fc2")), kit="hydra_layer"),
    Case("Hydra", dict(rank=3, scaling=0.5, dropout=0.5), kit="hydra_block"),
    Case("IncreLoRA", dict(max_rank=2, warmup=0, interval=1, targets=("q", "fc2")), kit="increlora"),
    Case("LayerNormTuning"),
    Case("LinearProbe", trains=False),
    Case("LoCA", dict(coefficients=20, targets=("q", "fc2"))),
    Case("LoLDU", dict(rank=8, targets=("q", "fc2", "patch")), kit="loldu"),
    Case("LoRA", dict(rank=2, targets=("all-linear",)), kit="cliplora_mha"),
    Case("LoRA", dict(rank=2, dropout=0.5, scaling="sqrt", targets=("qkv", "fc2"))),
    Case("LoRAGA", dict(rank=2, targets=("q", "fc2", "patch")), kit="loraga"),
    Case("LoRASB", dict(rank=2, targets=("q", "fc2", "patch")), kit="lorasb"),
    Case("LoRAXS", dict(rank=4, targets=("q", "fc2", "patch")), kit="loraxs"),
    Case("MapSAMDoRA", dict(rank=2, targets=("q", "proj", "fc2")), kit="mapsam_dora"),
    Case("MoSA", dict(width=4), kit="mosa"),
    Case("MoSA", dict(width=4, experts=3, style="houlsby", share=None, merge="joint", targets=("attn_res", "mlp_res"))),
    Case("PaCA", dict(rank=2, targets=("q", "fc2", "patch")), kit="paca"),
    Case("PAdapter", dict(reduction=4), kit="padapter_self"),
    Case("PAdapter", dict(p=1.25, mu0=10.0, reduction=2, mask_self_loops=True)),
    Case("PAdapter", dict(reduction=2, sample_len=3, targets=("text.*attn", "text.*.mlp"))),
    Case("PEFT", dict(tuner="AdaLoRA", options=dict(init_r=3, target_r=1), targets=("q", "patch")), extra="peft"),
    Case("PEFT", dict(tuner="HRA", options=dict(r=2)), extra="peft"),
    Case("PEFT", dict(tuner="LoHa", options=dict(r=2), targets=("layer*.conv*", "down")), extra="peft"),
    Case("PEFT", dict(tuner="LoRA", options=dict(r=2), targets=("patch", "down")), extra="peft"),
    Case("Pfeiffer", dict(width=4)),
    Case("Poly", dict(n_skills=2, rank=2, targets=("q", "fc2")), kit="poly"),
    Case("Poly", dict(n_tasks=3, n_skills=3, n_splits=2, task=1, targets=("q", "fc2")), kit="mhr_poly"),
    Case("QWHA", dict(rank=2, alpha=300.0, targets=("q", "fc2", "patch")), kit="qwha"),
    Case("QWHA", dict(rank=2, alpha=300.0, base_bits=4, targets=("v", "proj"))),
    Case("RandLoRA", dict(rank=4, targets=("q", "v", "proj", "fc1")), kit="randlora"),
    Case("Rein", dict(length=5, rank=2, query_dim=None), kit="rein"),
    Case("Rein", dict(length=5, rank=None, query_dim=None, zero_start=True), kit="rein_full"),
    Case("SALT", dict(rank=2, targets=("q", "fc2", "patch")), kit="salt"),
    Case("SALT", dict(scaled=4, rank=2, relu="scaled", targets=("q", "fc2", "patch"))),
    Case("SHiRA", dict(rank=2, targets=("q", "fc2", "patch")), kit="shira"),
    Case("SHiRA", dict(rank=2, mask="snip", targets=("v", "proj"))),
    Case("SLRA", dict(rank=12, heads=2), kit="slra"),
    Case("SNELL", dict(rank=2, targets=("all-linear",)), kit="snell_block"),
    Case("SNELLA", dict(rank=2, dropout=0.1, drop_path=0.1, targets=("all-linear",)), kit="snella_alloc"),
    Case("SoKA", dict(rank=3, targets=("q", "fc2", "patch"))),
    Case("SoKA", dict(rank=None, energy=0.3, outer=[4, 2], targets=("fc1", "fc2"))),
    Case("SoRA", dict(rank=3, targets=("q", "fc2")), kit="sora"),
    Case("SoRA", dict(rank=3, variant="official", penalty=0.1, dropout=0.5, targets=("q", "fc2"))),
    Case("SSAM", dict(targets=("q", "fc2", "patch")), kit="ssam_svd"),
    Case("SSF"),
    Case("SVFit", dict(targets=("q", "fc2", "patch"))),
    Case("TemporalShift", trains=False, frames=2),
    Case("TLoRA", dict(rank=2, targets=("q", "fc2", "patch"))),
    Case("VPT", dict(count=3)),
    Case("VPT", dict(count=3, deep=False)),
    Case("WaRA", dict(rank=2, targets=("q", "fc2"))),
    Case("WaRA", dict(rank=2, version="v2", wavelet="db2", targets=("attn", "mlp"))),
    Case("WaRA", dict(rank=4, version="tiny", targets=("v", "proj"))),
    Case("ZeroI2V", dict(num_frames=3, offsets=[[1, 1], [-2, 1]]), kit="zeroi2v_vit", frames=3),
    Case("ZeroI2V", dict(num_frames=3, ratio=None), frames=2),
]
