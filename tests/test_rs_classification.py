"""EuroSAT with 13 bands, RESISC45 and BigEarthNet on small files written here, and what trains on several labels."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from sklearn.metrics import average_precision_score, f1_score
from torch.utils.data import DataLoader

from visadapt.datasets.base import collate, data_root
from visadapt.datasets.bigearthnet import CLASSES, LEFT_OUT, NOMENCLATURE, BigEarthNet, multi_hot
from visadapt.datasets.eurosat import EuroSAT
from visadapt.datasets.eurosat_ms import BANDS, EuroSATMS, named_patches
from visadapt.datasets.eurosat_ms import CLASSES as EUROSAT
from visadapt.datasets.resisc45 import RESISC45
from visadapt.errors import InputError
from visadapt.losses.multilabel import MultilabelBCE
from visadapt.metrics.multilabel import MultilabelMetric
from visadapt.registry import LOSSES, METRICS

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_tif(path, bands):
    """A uint16 tif of an array (bands, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype="uint16") as raster:
        raster.write(bands.astype(np.uint16))


# ---- EuroSAT ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def eurosat_ms(tmp_path):
    """One patch of three classes; band i of the file is 1000 (i + 1) plus the class, the first pixel one more."""
    for name in ("AnnualCrop", "River", "SeaLake"):
        image = np.full((13, 6, 6), EUROSAT.index(name)) + 1000 * np.arange(1, 14)[:, None, None]
        image[:, 0, 0] += 1
        write_tif(tmp_path / name / f"{name}_7.tif", image)
    (tmp_path / "train.txt").write_text("River/River_7.tif\nAnnualCrop/AnnualCrop_7.tif\n")
    (tmp_path / "rgb.txt").write_text("SeaLake/SeaLake_7.jpg\nRiver_7.jpg\n")
    return tmp_path


def test_eurosat_gives_13_bands_as_they_are(eurosat_ms):
    data = EuroSATMS("train", root=eurosat_ms)
    sample = data[0]
    assert sample["inputs"].shape == (13, 6, 6) and sample["inputs"].dtype == torch.float32
    assert sample["inputs"][:, 3, 3].tolist() == [1000 * i + 8 for i in range(1, 14)]
    assert sample["inputs"][0, 0, 0] == 1009 and sample["path"].endswith("River/River_7.tif")
    assert [data[i]["label"] for i in range(2)] == [8, 0] and data.classes == EUROSAT and len(EUROSAT) == 10


def test_bands_are_chosen_by_name_in_the_order_that_is_asked_for(eurosat_ms):
    data = EuroSATMS(
        "train", ["B04", "B8A", "B02"], root=eurosat_ms, transform=[dict(type="Resize", height=4, width=4)]
    )
    assert data.channels == 3 and data[0]["inputs"].shape == (3, 4, 4)
    assert data[0]["inputs"][:, 3, 3].tolist() == [4008, 13008, 2008]  # B8A is the last of the file
    assert len(BANDS) == 13 and BANDS[8:] == ("B09", "B10", "B11", "B12", "B8A")
    for bands, message in (
        (["B04", "B8"], r"EuroSATMS has no band 'B8' \(did you mean"),
        ([], "bands are names, each once"),
        (["B04", "B04"], "bands are names, each once"),
    ):
        with pytest.raises(InputError, match=message):
            EuroSATMS("train", bands, root=eurosat_ms)


def test_lists_of_the_rgb_version_name_the_same_patches(eurosat_ms):
    data = EuroSATMS(list_file="rgb.txt", root=eurosat_ms)
    assert [data[i]["inputs"][0, 1, 1].item() for i in range(2)] == [1009, 1008]
    assert data.labels == [9, 8]


def test_eurosat_labels_equal_those_of_the_rgb_set():
    try:
        root = data_root("eurosat")
    except InputError as error:
        pytest.skip(str(error))
    rgb = EuroSAT("val", root=root)
    paths, labels = named_patches(root / "val.txt", root / "2750", EUROSAT, ".jpg")
    assert [str(p) for p in paths] == rgb.paths and labels == rgb.labels and rgb.classes == EUROSAT


def test_eurosat_mistakes(eurosat_ms):
    (eurosat_ms / "bad.txt").write_text("River_7.tif\nRivers/Rivers_7.tif\n")
    (eurosat_ms / "lost.txt").write_text("River_8.tif\n")
    write_tif(eurosat_ms / "River" / "River_9.tif", np.zeros((3, 6, 6)))
    (eurosat_ms / "short.txt").write_text("River_9.tif\n")
    for options, message in (
        (dict(split="test"), r"EuroSATMS: no list .*test\.txt; put the list of that split there, or give list_file"),
        (dict(split="tset"), r"EuroSATMS has no split 'tset' \(did you mean"),
        (dict(list_file="bad.txt"), r"bad\.txt:2: 'Rivers/Rivers_7\.tif' is not named <class>_<number>.*'River'"),
        (dict(list_file="lost.txt"), r"1 of 1 listed images do not exist: .*River/River_8\.tif"),
    ):
        with pytest.raises(InputError, match=message):
            EuroSATMS(root=eurosat_ms, **options)
    with pytest.raises(InputError, match=r"River_9\.tif has 3 bands.*13 are needed"):
        EuroSATMS(list_file="short.txt", bands=["B02"], root=eurosat_ms)[0]


# ---- RESISC45 --------------------------------------------------------------------------------------------------------
def test_resisc45_by_bare_names_and_by_paths(tmp_path):
    for name, value in (("railway", 10), ("railway_station", 200)):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / f"{name}_001.jpg"), np.full((8, 8, 3), value, np.uint8))
    (tmp_path / "test.txt").write_text("railway_station_001.jpg\nrailway/railway_001.jpg\n")
    data = RESISC45("test", root=tmp_path)
    assert [data.classes[s["label"]] for s in data] == ["railway_station", "railway"]
    assert [round(s["inputs"].float().mean().item()) for s in data] == [200, 10]
    assert len(set(data.classes)) == 45 and list(data.classes) == sorted(data.classes)
    with pytest.raises(InputError, match="RESISC45 has no split"):
        RESISC45("all", root=tmp_path)


# ---- BigEarthNet -----------------------------------------------------------------------------------------------------
SIDES = dict(
    B01=20, B02=120, B03=120, B04=120, B05=60, B06=60, B07=60, B08=120, B8A=60, B09=20, B11=60, B12=60
)  # fmt: skip


def write_patch(root, name, labels, seed=0):
    generator = np.random.default_rng(seed)
    for band, side in SIDES.items():
        write_tif(root / name / f"{name}_{band}.tif", generator.integers(0, 9000, (1, side, side)))
    (root / name / f"{name}_labels_metadata.json").write_text(json.dumps({"labels": labels, "projection": "…"}))


@pytest.fixture(scope="module")
def bigearthnet(tmp_path_factory):
    root = tmp_path_factory.mktemp("ben")
    write_patch(root, "S2A_1", ["Rice fields", "Vineyards", "Olive groves", "Airports", "Sea and ocean"], 1)
    write_patch(root, "S2A_2", ["Bare rock"], 2)
    write_patch(root, "S2B_3", ["Transitional woodland/shrub", "Pastures"], 3)
    (root / "train.csv").write_text("S2A_1\nS2A_2\nS2B_3\n")
    (root / "val.csv").write_text("S2B_3,S1A_77\n")
    return root


def test_the_nomenclature_joins_43_classes_to_19():
    joined = [name for names in NOMENCLATURE.values() for name in names]
    assert len(CLASSES) == 19 and len(LEFT_OUT) == 11 and len({*joined, *LEFT_OUT}) == 43 == len(joined) + len(LEFT_OUT)


def test_labels_are_multi_hot_and_batches_stack_them(bigearthnet):
    data = BigEarthNet("train", ["B02", "B11"], root=bigearthnet)
    named = [[CLASSES[k] for k, v in enumerate(data[i]["label"]) if v] for i in range(3)]
    assert named == [
        ["Arable land", "Permanent crops", "Marine waters"],
        [],
        ["Pastures", "Transitional woodland, shrub"],
    ]
    batch = next(iter(DataLoader(data, batch_size=3, collate_fn=collate)))
    assert batch["labels"].shape == (3, 19) and batch["labels"].dtype == torch.int64
    assert batch["labels"].sum(1).tolist() == [3, 0, 2] and batch["inputs"].shape == (3, 2, 120, 120)
    assert BigEarthNet("val", root=bigearthnet)[0]["path"].endswith("S2B_3")


def test_bands_are_brought_to_one_size(bigearthnet):
    data = BigEarthNet("train", root=bigearthnet)
    image = data.load(0)
    assert image.shape == (120, 120, 12) and image.dtype == np.float32
    for place, (band, side) in enumerate(SIDES.items()):
        with rasterio.open(bigearthnet / "S2A_1" / f"S2A_1_{band}.tif") as raster:
            stored = torch.from_numpy(raster.read().astype(np.float32))
        wanted = torch.nn.functional.interpolate(stored[None], (120, 120), mode="bilinear", align_corners=False)[0, 0]
        assert np.allclose(image[..., place], wanted, atol=0.1), (band, side)  # of values up to 9000


def test_unreadable_patches_keep_their_labels_and_are_marked(tmp_path):
    write_patch(tmp_path, "a", ["Pastures"])
    write_patch(tmp_path, "b", ["Salines"])
    (tmp_path / "test.csv").write_text("a\nb\n")
    data = BigEarthNet("test", ["B03", "B05"], root=tmp_path)
    write_tif(tmp_path / "b" / "b_B05.tif", np.zeros((1, 30, 60)))
    sample = data[1]
    assert (
        not sample["valid"] and not sample["inputs"].any() and sample["label"][CLASSES.index("Coastal wetlands")] == 1
    )
    (tmp_path / "b" / "b_B05.tif").unlink()
    assert data[1]["unreadable"].endswith("b")
    strict = BigEarthNet("test", ["B03", "B05"], root=tmp_path, strict=True)
    with pytest.raises(InputError, match=r"b_B05\.tif cannot be read"):
        strict[1]


def test_bigearthnet_mistakes(bigearthnet, tmp_path):
    with pytest.raises(InputError, match="BigEarthNet has no band 'B10'"):
        BigEarthNet("train", ["B10"], root=bigearthnet)
    with pytest.raises(InputError, match=r"no list .*test\.csv"):
        BigEarthNet("test", root=bigearthnet)
    (tmp_path / "lost.csv").write_text("S2A_1\nS2A_99\n")
    with pytest.raises(InputError, match=r"S2A_99_labels_metadata\.json cannot be read: no such file"):
        BigEarthNet(list_file=tmp_path / "lost.csv", root=bigearthnet)
    for text, message in (
        ('{"labels": ["Pasture"]}', r"'Pasture' is no class of BigEarthNet \(did you mean 'Pastures'"),
        ('{"label": []}', "no JSON object with a list 'labels'"),
        ("[1]", "no JSON object with a list 'labels'"),
        ('{"labels": "Pastures"}', "no JSON object with a list 'labels'"),
        ('{"labels": ', "no JSON object with a list 'labels'"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=rf"x\.json.*{message}"):
            multi_hot(tmp_path / "x.json")


# ---- several labels per image ----------------------------------------------------------------------------------------
def test_multilabel_loss_is_that_of_each_class_by_itself():
    logits = (torch.randn(5, 4) * 3).bfloat16().requires_grad_()
    target = torch.randint(0, 2, (5, 4))
    s = logits.float().sigmoid()
    value = LOSSES.build(dict(type="MultilabelBCE"))(logits, target)
    assert torch.isclose(value, -(target * s.log() + (1 - target) * (1 - s).log()).mean())
    assert torch.isclose(value, torch.nn.MultiLabelSoftMarginLoss()(logits.float(), target))
    assert value.dtype == torch.float32 and torch.autograd.grad(value, logits)[0].isfinite().all()
    with pytest.raises(InputError, match=r"scores, the labels are \(5,\); these are class indices, for which"):
        MultilabelBCE()(logits, target[:, 0])
    with pytest.raises(InputError, match=r"gives \(5, 4\) scores, the labels are \(5, 3\); set num_classes"):
        MultilabelBCE()(logits, target[:, :3])


def feed(metric, probabilities, labels, valid=None, classes="abcde"):
    metric.dataset_meta = {"classes": tuple(classes)}
    valid = torch.ones(len(labels), dtype=torch.bool) if valid is None else valid
    for i in range(0, len(labels), 16):
        part = slice(i, i + 16)
        paths = [f"{n}.tif" for n in range(len(labels))[part]]
        batch = {"labels": labels[part], "valid": valid[part], "path": paths}
        metric.process(batch, [{"probabilities": p} for p in probabilities[part]])
    return metric.evaluate(len(labels))


def random_case(n=60, k=5):
    """The last class is neither in the labels nor predicted, the one before it in no label."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, k, generator=generator) < 0.3).long()
    labels[:, 3:] = 0
    probabilities = (torch.randn(n, k, generator=generator) + 2 * labels - 0.5).sigmoid()
    probabilities[:, 4] *= 0.3
    return probabilities, labels


def test_multilabel_figures_equal_sklearn():
    probabilities, labels = random_case()
    metric = MultilabelMetric()
    out = feed(metric, probabilities, labels)
    assert list(out) == ["map_macro", "map_micro", "f1_macro", "f1_micro"] and all(
        type(v) is float for v in out.values()
    )
    p, t = probabilities.numpy(), labels.numpy()
    assert out["map_macro"] == pytest.approx(average_precision_score(t[:, :3], p[:, :3], average="macro"), abs=1e-6)
    assert out["map_micro"] == pytest.approx(average_precision_score(t, p, average="micro"), abs=1e-6)
    assert out["f1_macro"] == pytest.approx(
        f1_score(t[:, :4], p[:, :4] > 0.5, average="macro", zero_division=0), abs=1e-6
    )
    assert out["f1_micro"] == pytest.approx(f1_score(t, p > 0.5, average="micro"), abs=1e-6)
    rows = metric.report["per_class"]
    assert [r["count"] for r in rows] == labels.sum(0).tolist()
    assert rows[3]["average_precision"] is None and rows[3]["f1"] == 0.0 and rows[4]["f1"] is None
    assert json.loads(json.dumps(metric.report)) == metric.report


def test_the_worst_images_are_those_with_most_wrong_classes():
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    probabilities = torch.tensor([[0.9, 0.2, 0.6], [0.8, 0.1, 0.4], [0.5, 0.7, 0.9]])
    metric = MultilabelMetric()
    feed(metric, probabilities, labels, classes="abc")
    assert metric.report["worst"] == [
        {"path": "0.tif", "missed": ["b"], "added": ["c"]},
        {"path": "2.tif", "missed": [], "added": ["b"]},
    ]


def test_invalid_samples_do_not_count_and_mistakes_are_told(caplog):
    probabilities, labels = random_case()
    valid = torch.arange(60) % 3 > 0
    broken = probabilities.clone()
    broken[~valid] = float("nan")
    metric = MultilabelMetric()
    assert feed(metric, broken, labels, valid) == feed(MultilabelMetric(), probabilities[valid], labels[valid])
    assert metric.report["invalid"] == 20
    with pytest.raises(InputError, match=r"scores of 0\.tif are not finite"):
        feed(MultilabelMetric(), broken, labels)
    with pytest.raises(
        InputError, match=r"probabilities, the labels are \(16,\); take a data set with multi-hot labels"
    ):
        feed(MultilabelMetric(), probabilities, labels[:, 0])
    with pytest.raises(InputError, match="60 of 60 samples are valid and none has a class"):
        feed(MultilabelMetric(), probabilities, labels * 0)
    with pytest.raises(InputError, match="gives 5 scores, the data set has 3 classes"):
        feed(MultilabelMetric(), probabilities, labels, classes="abc")
    evaluator = Evaluator(METRICS.build(dict(type="MultilabelMetric")))
    with pytest.raises(InputError, match="classes that exclude each other; take the task MultilabelClassifier"):
        evaluator.process([{"scores": p} for p in probabilities], {"labels": labels})
    assert "prefix" not in caplog.text
