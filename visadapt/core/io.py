"""The adapter file: one safetensors file that says what it is, for which base, and how to check it.

Tensors are named `adapters/<name>/<site key>/<parameter>`, `adapters/<name>/shared/<parameter>`,
`base/<name>/<parameter>` (only base values that were trained), `heads/<name>/<parameter>` and `probe/output`.
The metadata holds one JSON manifest under the key "visadapt".
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..errors import InputError
from ..files import atomic
from ..registry import ADAPTERS, HEADS, arguments_of
from .manifest import manifest_problem
from .probe import check_probe, run_probe

if TYPE_CHECKING:
    from .adapted import Adapted

FORMAT = 1

OWN = ("format", "visadapt", "adapters", "backbone", "heads", "num_frames", "tensors", "sha256")
"""Keys of the manifest that this module writes; the others say something of the task."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        loaded: tensors of the file that were read into modules.
        expected_missing: base tensors, which an adapter file leaves out on purpose.
        unexpected: tensors of the file that nobody asked for (heads that were not handed in).
        probe_error: largest difference from the stored probe, relative to max(1, |y|); None where it was not run.
    """

    loaded: list[str]
    expected_missing: list[str]
    unexpected: list[str]
    probe_error: float | None = None

    def __str__(self) -> str:
        probe = "" if self.probe_error is None else f", probe differs by {self.probe_error:.1e}"
        unused = f", unused: {', '.join(self.unexpected)}" if self.unexpected else ""
        base = f"{len(self.expected_missing)} base tensors stay as they are"
        return f"loaded {len(self.loaded)} tensors; {base}{unused}{probe}"


def _digest(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """sha256 over names, shapes and values, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", dtype or tensors[name].dtype).contiguous()
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _checksum(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 over everything in a file but the checksum itself."""
    said = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256((said + _digest(tensors)).encode()).hexdigest()


def _listed(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape and type of every tensor, as JSON values."""
    return {k: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in tensors.items()}


def fingerprint(adapted: Adapted) -> str:
    """sha256 of the untouched base in float32, whatever is merged or swapped in at the moment."""
    tensors = {k: v for k, v in adapted.backbone.body.state_dict().items() if v.is_floating_point()}
    tensors |= adapted.base_values.originals
    for path, original in adapted.merger.originals.items():
        weight, bias = original.of(adapted.backbone.body.get_submodule(path))
        tensors[f"{path}.weight"] = weight
        tensors.pop(f"{path}.bias", None)
        if bias is not None:
            tensors[f"{path}.bias"] = bias
    return _digest(tensors, torch.float32)


def adapter_tensors(adapted: Adapted, name: str) -> dict[str, Tensor]:
    """All tensors of one adapter under their names in a file."""
    adapter = adapted.adapters[name]
    found = {}
    for key, piece in adapter.pieces.items():
        found |= {f"adapters/{name}/{key}/{k}": v for k, v in piece.stored().items()}
    found |= {f"adapters/{name}/shared/{k}": v for k, v in adapter.common.state_dict().items()}
    found |= {f"base/{name}/{k}": v for k, v in adapted.base_values.values(name, adapted.backbone.body).items()}
    return found


def _head_entry(head: nn.Module) -> dict[str, Any]:
    """Type and arguments of a head; None for the arguments where only its owner knows how to build it again."""
    registered = HEADS.owns(head)
    return {
        "type": type(head).__name__,
        "arguments": arguments_of(head, ("in_dim", "in_channels")) if registered else None,
    }


def save_adapter(
    adapted: Adapted,
    path: str | os.PathLike,
    *names: str,
    heads: dict[str, nn.Module] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write adapters and heads; the file appears whole or not at all.

    Args:
        adapted: backbone with the adapters.
        path: a .safetensors file.
        names: adapters to write; all where none is given.
        heads: by name.
        extra: JSON values of the task: class names, bands, transforms.

    Raises:
        InputError: adapters are merged, a name is unknown, or the disk is full.
    """
    if adapted.merger.names:
        raise InputError(f"{adapted.merger.names} are merged; unmerge before saving an adapter file")
    heads = heads or {}
    tensors = {f"heads/{n}/{k}": v for n, head in heads.items() for k, v in head.state_dict().items()}
    entries = {n: _head_entry(head) for n, head in heads.items()}
    return _write(adapted, path, names or tuple(adapted.adapters), tensors, entries, extra or {})


def save_like(adapted: Adapted, path: str | os.PathLike, source: str | os.PathLike) -> Path:
    """Write all adapters of `adapted` with the heads of another file and what it says of its task.

    Args:
        adapted: backbone with the adapters.
        path: a .safetensors file.
        source: an adapter file.

    Raises:
        InputError: the source is damaged, or the disk is full.
    """
    told = read_manifest(source)
    heads = {k: v for k, v in read_tensors(source, told).items() if k.startswith("heads/")}
    extra = {k: v for k, v in told.items() if k not in OWN}
    return _write(adapted, path, tuple(adapted.adapters), heads, told["heads"], extra)


def _write(
    adapted: Adapted,
    path: str | os.PathLike,
    names: tuple[str, ...],
    head_tensors: dict[str, Tensor],
    heads: dict[str, Any],
    extra: dict[str, Any],
) -> Path:
    adapted.known(names)
    tensors = {k: v for n in names for k, v in adapter_tensors(adapted, n).items()} | head_tensors
    tensors["probe/output"] = run_probe(adapted, names)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    manifest = {
        "format": FORMAT,
        "visadapt": __version__,
        "adapters": {
            n: {
                "type": type(adapted.adapters[n]).__name__,
                "arguments": adapted.adapters[n].arguments(),
                "sites": [asdict(p.site) | {"key": k} for k, p in adapted.adapters[n].pieces.items()],
            }
            for n in names
        },
        "backbone": {
            "type": type(adapted.backbone).__name__,
            "arguments": adapted.backbone.arguments(),
            "fingerprint": fingerprint(adapted),
        },
        "heads": heads,
        "num_frames": adapted.ctx.num_frames,
        "tensors": _listed(tensors),
        **extra,
    }
    manifest["sha256"] = _checksum(manifest, tensors)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"visadapt": json.dumps(manifest)})
    return Path(path)


def _open(path: str | os.PathLike):
    if not Path(path).is_file():
        raise InputError(f"no adapter file {path}")
    if not os.access(path, os.R_OK):
        raise InputError(f"adapter file {path} cannot be read: permission denied")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no complete adapter file ({error}); it was cut off or is of another format"
        ) from error


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an adapter file, without reading its tensors.

    Raises:
        InputError: the file is missing, truncated, not an adapter file, of a later version, or its manifest is damaged.
    """
    with _open(path) as file:
        text = (file.metadata() or {}).get("visadapt")
    if text is None:
        raise InputError(f"{path} is a safetensors file without a visadapt manifest; it is no adapter file")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged manifest; fetch or write the file again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is int and version != FORMAT:
        raise InputError(
            f"{path} has format {version}, written by visadapt {manifest.get('visadapt')}; this is {__version__}, "
            f"which reads format {FORMAT}: upgrade to read it"
        )
    if problem := manifest_problem(manifest):
        raise InputError(f"{path} has a damaged manifest: {problem}; fetch or write the file again")
    return manifest


def read_tensors(path: str | os.PathLike, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of an adapter file.

    Raises:
        InputError: tensors or manifest are not those that were written.
    """
    with _open(path) as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    if _listed(tensors) != manifest["tensors"] or _checksum(manifest, tensors) != manifest["sha256"]:
        raise InputError(f"{path} does not match its checksum; the file was damaged or altered")
    return tensors


def load_adapter(
    adapted: Adapted,
    path: str | os.PathLike,
    heads: dict[str, nn.Module] | None = None,
    check_base: bool = True,
    check_probe_output: bool = True,
) -> LoadReport:
    """Read an adapter file into `adapted`; adapters that are not attached yet are built and attached.

    Where clips have one frame so far, they get as many as at saving.

    Args:
        adapted: the same base as at saving.
        path: the file.
        heads: heads to fill, by their names in the file.
        check_base: refuse another base; switch off only if you know that the bases are equal.
        check_probe_output: run the stored probe and compare.

    Raises:
        InputError: adapters are merged, a damaged file, another base, tensors that are missing or of other shape, or a
            probe that differs.
    """
    if adapted.merger.names:
        raise InputError(f"{adapted.merger.names} are merged; unmerge before loading an adapter file")
    manifest = read_manifest(path)
    tensors = read_tensors(path, manifest)
    made_for, here = manifest["backbone"], fingerprint(adapted)
    if check_base and made_for["fingerprint"] != here:
        name, weights = made_for["arguments"].get("name", ""), made_for["arguments"].get("weights", "")
        if weights is None:
            advice = "Its base had random weights, which are lost: train again with weights=... of the backbone"
        else:
            advice = (
                f"Name the weights that it was trained on{f', {weights}' if weights else ''} (--weights FILE of "
                "predict and merge, model.backbone.weights=FILE of test), or pass check_base=False to load() if the "
                "bases are equal"
            )
        raise InputError(
            f"{path} was made for {made_for['type']}({name}), fingerprint {made_for['fingerprint'][:12]}; "
            f"this backbone has {here[:12]}. {advice}"
        )
    attached = _attach_missing(adapted, manifest, path)
    try:
        return _fill(adapted, path, manifest, tensors, heads or {}, check_probe_output and check_base)
    except InputError:
        for name in attached:
            adapted.remove(name)
        raise


def _fill(
    adapted: Adapted,
    path: str | os.PathLike,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    heads: dict[str, nn.Module],
    probe: bool,
) -> LoadReport:
    """Copy a file's tensors into attached adapters and heads."""
    loaded: list[str] = []
    for name in manifest["adapters"]:
        own = adapter_tensors(adapted, name)
        given = {k: v for k, v in tensors.items() if k.startswith((f"adapters/{name}/", f"base/{name}/"))}
        _check_fit(given, own, f"{path}, adapter '{name}'")
        for key, piece in adapted.adapters[name].pieces.items():
            piece.restore(_below(given, f"adapters/{name}/{key}/"))
        adapted.adapters[name].common.load_state_dict(_below(given, f"adapters/{name}/shared/"))
        adapted.base_values.load(name, _below(given, f"base/{name}/"), adapted.backbone.body)
        loaded += given
    for name, head in heads.items():
        given = _below(tensors, f"heads/{name}/")
        _check_fit(given, head.state_dict(), f"{path}, head '{name}'")
        head.load_state_dict(given)
        loaded += [f"heads/{name}/{k}" for k in given]
    unexpected = sorted(set(tensors) - set(loaded) - {"probe/output"})
    names = tuple(manifest["adapters"])
    if probe and "probe/output" not in tensors:
        raise InputError(f"{path} holds no probe/output to check the adapter with; write the file again")
    frames = manifest.get("num_frames", adapted.ctx.num_frames)
    error = check_probe(adapted, names, tensors["probe/output"], path, frames) if probe else None
    if adapted.ctx.num_frames == 1:
        adapted.ctx.num_frames = frames
    return LoadReport(sorted(loaded), sorted(adapted.backbone.body.state_dict()), unexpected, error)


def _attach_missing(adapted: Adapted, manifest: dict[str, Any], path: str | os.PathLike) -> list[str]:
    """Build and attach the adapters that are not there yet.

    Returns:
        Their names.
    """
    for name, entry in manifest["adapters"].items():
        if name in adapted.adapters and (here := type(adapted.adapters[name]).__name__) != entry["type"]:
            raise InputError(f"{path} has {entry['type']} as adapter '{name}', here it is {here}; remove or rename it")
    missing = [n for n in manifest["adapters"] if n not in adapted.adapters]
    for name in missing:
        entry = manifest["adapters"][name]
        adapted.add(name, ADAPTERS.build({"type": entry["type"], **entry["arguments"]}))
    return missing


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check_fit(given: dict[str, Tensor], own: dict[str, Tensor], where: str) -> None:
    """Every name and shape must be there on both sides."""
    if missing := sorted(set(own) - set(given)):
        raise InputError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}")
    if extra := sorted(set(given) - set(own)):
        raise InputError(f"{where}: {len(extra)} tensors have no place here, first {extra[0]}")
    for key, value in given.items():
        if own[key].shape != value.shape:
            raise InputError(f"{where}: {key} is {tuple(value.shape)} in the file and {tuple(own[key].shape)} here")
