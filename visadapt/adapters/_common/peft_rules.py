"""What was measured of the tuners of HF PEFT on plain vision modules: which work, with what care, and which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...errors import InputError, hint


@dataclass(frozen=True)
class Tuner:
    """One tuner that works.

    Attributes:
        type: its name in `peft.PeftType`.
        modules: what it can sit at, of "Linear", "Conv2d" and "LayerNorm".
        defaults: options whose default of PEFT would make a fresh adapter no identity, or a file that cannot be read.
        adds_bias: it gives a bias to layers that have none.
        noisy: it draws random numbers in training even without dropout.
        keep: buffers that PEFT recomputes from the base at loading; here they are saved, for the base may come later.
    """

    type: str
    modules: tuple[str, ...] = ("Linear",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adds_bias: bool = False
    noisy: bool = False
    keep: tuple[str, ...] = ()


CONV = ("Linear", "Conv2d")
IDENTITY = {"init_weights": True}

TUNERS = {
    "AdaLoRA": Tuner("ADALORA", CONV),
    "BEFT": Tuner("BEFT", adds_bias=True),
    "BOFT": Tuner("BOFT", CONV),
    "C3A": Tuner("C3A", defaults=IDENTITY),
    "DEFT": Tuner("DEFT"),
    "DeLoRA": Tuner("DELORA"),
    "DoRA": Tuner("LORA", CONV, {"use_dora": True}),
    "FourierFT": Tuner("FOURIERFT", defaults=IDENTITY),
    "GLoRA": Tuner("GLORA"),
    "GraLoRA": Tuner("GRALORA"),
    "HiRA": Tuner("HIRA", CONV),
    "HRA": Tuner("HRA", CONV),
    "IA3": Tuner("IA3", CONV),
    "LNTuning": Tuner("LN_TUNING", ("LayerNorm",)),
    "LoHa": Tuner("LOHA", CONV),
    "LoKr": Tuner("LOKR", CONV),
    "LoRA": Tuner("LORA", CONV),
    "MiSS": Tuner("MISS"),
    "OFT": Tuner("OFT", CONV),
    "PEANuT": Tuner("PEANUT"),
    "PSOFT": Tuner("PSOFT", keep=("_psoft_A_cache", "_psoft_B_cache")),
    "PVeRA": Tuner("PVERA", noisy=True),
    "RandLoRA": Tuner("RANDLORA"),
    "RoAd": Tuner("ROAD"),
    "SHiRA": Tuner("SHIRA", defaults={"random_seed": 0}),
    "SuperTuning": Tuner("SUPERTUNING"),
    "TinyLoRA": Tuner("TINYLORA"),
    "UniLoRA": Tuner("UNILORA"),
    "VBLoRA": Tuner("VBLORA"),
    "VeRA": Tuner("VERA"),
    "WaveFT": Tuner("WAVEFT"),
}

RANKS = {"AdaLoRA": "init_r", "DoRA": "r", "HRA": "r", "LoRA": "r"}
"""Options that are ranks of a matrix of the site's size."""

_TEXT = "it needs a language model with the configuration of transformers"
_SEARCH = "what it finds in the base at the start is not stored, so it answers wrongly when the base is loaded later"

REFUSED = {
    "AdaMSS": _SEARCH,
    "AdaptionPrompt": _TEXT,
    "Bone": "PEFT 0.21 dropped the name; it is MiSS with options=dict(init_weights='bat')",
    "Cartridge": _TEXT,
    "CPT": _TEXT,
    "FRoD": _SEARCH,
    "Lily": "it mixes its experts over all images of a batch, so that an image's output depends on its neighbours",
    "MultitaskPromptTuning": _TEXT,
    "OSF": "it trains as many numbers as the weights have and does not store what it keeps; train the base itself",
    "Poly": "its layers need task ids in every call; use the adapter type='Poly', which has n_splits (MHR) too",
    "PrefixTuning": _TEXT,
    "PromptTuning": _TEXT,
    "PTuning": _TEXT,
    "Shadow": _TEXT,
    "TrainableTokens": "it trains rows of a token embedding and a vision backbone has none",
    "XLoRA": _TEXT,
}

_SITES = "visadapt chooses the places; use targets and layers"
_OBJECT = "it serves language models, quantised or sharded bases, or passes and losses of PEFT's own trainer"

REFUSED_OPTIONS = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"), _SITES
    ),
    **dict.fromkeys(("modules_to_save", "feedforward_modules", "fan_in_fan_out"), _SITES),
    **dict.fromkeys(("inference_mode", "task_type", "peft_type", "peft_version", "auto_mapping"), _OBJECT),
    **dict.fromkeys(("base_model_name_or_path", "revision", "megatron_config", "megatron_core"), _OBJECT),
    **dict.fromkeys(("trainable_token_indices", "loftq_config", "eva_config", "corda_config"), _OBJECT),
    **dict.fromkeys(("lora_ga_config", "monteclora_config", "arrow_config"), _OBJECT),
    **dict.fromkeys(("alora_invocation_tokens", "use_qalora", "qalora_group_size", "layer_replication"), _OBJECT),
    **dict.fromkeys(("runtime_config", "use_bdlora", "ensure_weight_tying"), _OBJECT),
    "total_step": "it is the length of the run",
    **dict.fromkeys(("AdaLoRA.r", "AdaLoRA.rank_pattern"), "its ranks are init_r, then fall to target_r"),
    "AdaLoRA.init_lora_weights": "AdaLoRA has one start",
    **dict.fromkeys(("AdaLoRA.use_rslora", "AdaLoRA.lora_bias", "AdaLoRA.alpha_pattern"), "AdaLoRA does not read it"),
    "kasa_config": "KaSA drops singular values of the base, so that the outputs change before any training",
    "generator_seed": "PEFT keeps a generator in the layer, which cannot be copied or saved",
    "save_only_topk_weights": "files of visadapt hold every tensor",
    "velora_config": "a part of its state is not in files, so that a run may not be resumed as it was",
}

_SEED = "what is drawn from it is not in files but drawn again at loading; give a number"

REFUSED_VALUES = {
    ("init_lora_weights", "corda"): "it needs covariances of the data and fails on (B, N, C) tokens",
    ("init_lora_weights", "eva"): "it needs a pass over the data that the bridge does not run",
    ("init_lora_weights", "loftq"): "it replaces the base by a quantised one",
    ("init_lora_weights", "lora_ga"): "it starts from gradients that are gone at loading, so a file reads back wrong",
    ("proj_seed", None): _SEED,
    ("random_seed", None): _SEED,
    ("TinyLoRA.init_weights", False): "PEFT leaves the weights uninitialised then",
}
"""By option and value; the tuner stands before the option where only that one breaks."""

ONLY_VALUES = {
    "apply_GS": (False, "it divides by zero at PEFT's symmetric start, so that a fresh adapter changes the output"),
    "bias": ("none", "it trains biases of the base, so that with the adapter switched off the base is another one"),
    "mask_type": ("random", "PEFT has no other mask of its own and options cannot hold a function"),
    "sample_at_inference": (False, "outputs would be random in evaluation too"),
    "save_precomputed_indices": (True, "the places come from the base weights and have to be in the file"),
}
"""Options of which one value works, with the reason against all others."""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def kind_of(module: nn.Module) -> str | None:
    """The name under which the tables know a module."""
    return next((n for n in ("Linear", "Conv2d", "LayerNorm") if isinstance(module, getattr(nn, n))), None)


def tuner_name(given: str) -> str:
    """The tuner's name as it is written in the tables, whatever the case and the dashes of `given`.

    Raises:
        InputError: an unknown tuner, or one that does not work on a vision backbone, with the reason.
    """
    known = {_plain(n): n for n in (*TUNERS, *REFUSED)}
    name = known.get(_plain(str(given)))
    if name is None:
        raise InputError(f"PEFT: no tuner '{given}'{hint(given, TUNERS)}")
    if name in REFUSED:
        raise InputError(f"PEFT: tuner '{name}' is refused: {REFUSED[name]}")
    return name


def _against(name: str, option: str, value: Any) -> str | None:
    """What speaks against a value of an option."""
    if option.endswith("dropout") and not (isinstance(value, int | float) and 0 <= value < 1):
        return "it must be in [0, 1)"
    if option in ONLY_VALUES:
        good, reason = ONLY_VALUES[option]
        return None if value == good else reason
    if isinstance(value, list | dict):
        return None
    return REFUSED_VALUES.get((option, value)) or REFUSED_VALUES.get((f"{name}.{option}", value))


def check_options(name: str, options: Mapping[str, Any], fields: list[str]) -> None:
    """Refuse options that the tuner does not have or that break the bridge.

    Args:
        name: tuner.
        options: as the user gave them, with the defaults of the table.
        fields: what the tuner's configuration takes.

    Raises:
        InputError: an unknown option or one that is refused, with the reason.
    """
    for option, value in options.items():
        refused = REFUSED_OPTIONS.get(f"{name}.{option}") or REFUSED_OPTIONS.get(option)
        if option in fields and refused:
            raise InputError(f"PEFT '{name}': option '{option}' is refused: {refused}")
        if option not in fields:
            good = [f for f in fields if f not in REFUSED_OPTIONS]
            raise InputError(f"PEFT '{name}' has no option '{option}'{hint(option, good)}")
        if reason := _against(name, option, value):
            raise InputError(f"PEFT '{name}': {option}={value!r} is refused: {reason}")
