"""From files to a config: what `data check` says, masks that are not there, base files, and the config to copy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visadapt import config
from visadapt.cli import main
from visadapt.datasets.inspect import misfit
from visadapt.datasets.raster import RasterSegDataset
from visadapt.errors import InputError

OWN_MASKS = Path(__file__).parent.parent / "configs" / "own_masks.py"
TINY = (
    "model.backbone.weights=None",
    "model.backbone.out_indices=[0,1]",
    "model.backbone.arch={'depth':2,'embed_dim':32,'num_heads':2,'init_values':1.0}",
)


def write(folder: Path, split: str, sizes: list[tuple[int, int]]) -> None:
    """Pictures that are bright where their mask is 1."""
    random = np.random.default_rng(len(split))
    for part in ("images", "masks"):
        (folder / part / split).mkdir(parents=True)
    for n, (height, width) in enumerate(sizes):
        mask = random.integers(0, 2, (-(-height // 14), -(-width // 14))).repeat(14, 0).repeat(14, 1)[:height, :width]
        image = random.integers(0, 80, (height, width, 3)) + 120 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / split / f"{n}.jpg", quality=95)
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / split / f"{n}.png")


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder of data as the config's comment shows it, one image smaller than the crops."""
    monkeypatch.setenv("VISADAPT_DATA", str(tmp_path))
    write(tmp_path / "mine", "train", [(240, 260), (300, 230), (100, 120), (224, 224)])
    write(tmp_path / "mine", "val", [(240, 300), (90, 110)])
    return tmp_path


# the config to copy


def test_a_copy_of_the_config_for_own_masks_trains(own, capsys):
    copy = own / "copy.py"
    copy.write_text(OWN_MASKS.read_text())
    assert main(["check", str(copy), *TINY]) == 0
    assert "train         4 samples\nval           5 samples" in capsys.readouterr().out
    words = [*TINY, "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    assert main(["train", str(copy), "--work-dir", str(own / "run"), *words]) == 0
    assert {"adapter_best.safetensors", "predictions.html"} <= {p.name for p in (own / "run").iterdir()}


def test_what_the_comments_of_that_config_offer_is_taken(tmp_path):
    text, lines = re.subn(r"# (?=(?:colors|bands|in_chans)=)", "", OWN_MASKS.read_text())
    (tmp_path / "copy.py").write_text(text.replace("[...]", "[1, 2, 3, 4]"))
    cfg = config.load(tmp_path / "copy.py")
    assert lines == 3 and cfg.model.backbone.in_chans == len(cfg.val_dataloader.dataset.bands) == 4
    assert len(cfg.train_dataloader.dataset.colors) == cfg.model.head.num_classes == 2
    assert not {"classes", "files", "epochs"} & set(cfg)


# statistics


def test_data_check_gives_statistics_to_paste(own, capsys):
    assert main(["data", "check", str(OWN_MASKS), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["train"]
    pixels = np.concatenate(
        [np.array(Image.open(p), float).reshape(-1, 3) for p in (own / "mine/images/train").iterdir()]
    )
    assert found["misfit"] == []
    assert [row["mean"] for row in found["bands"]] == pytest.approx(pixels.mean(0), rel=1e-5)
    assert [row["std"] for row in found["bands"]] == pytest.approx(pixels.std(0), rel=1e-5)

    assert main(["data", "check", str(OWN_MASKS)]) == 0
    mean, std = re.findall(r"^mean=(\[.*\]), std=(\[.*\])$", capsys.readouterr().out, re.MULTILINE)[0]
    words = [f"model.backbone.mean={mean}", f"model.backbone.std={std}"]
    assert config.load(OWN_MASKS, words).model.backbone.mean == pytest.approx(pixels.mean(0), rel=1e-3)

    assert main(["data", "check", str(OWN_MASKS), "model.backbone.mean=[0.485,0.456,0.406]", words[1]]) == 0
    said = capsys.readouterr().out
    assert "misfit: band 0 has mean" not in said  # not beyond 3 std
    assert main(["data", "check", str(OWN_MASKS), words[0], "model.backbone.std=[0.229,0.224,0.225]"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^misfit: band 0 has mean [\d.]+ and std [\d.]+, the backbone normalises by [\d.]+ and 0.229;", said, re.M
    )


def row(low, high, mean, std):
    return {"band": "B8", "min": low, "max": high, "mean": mean, "std": std}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(0, 255, 120, 60)], ""),
        ([row(0, 255, 299, 60)], ""),
        ([row(0, 900, 301, 60)], "band B8 has mean 301 and std 60, the backbone normalises by 120 and 60"),
        ([row(-900, 255, -61, 60)], "band B8 has mean -61"),
        ([row(0, 900, 120, 299)], ""),
        ([row(0, 900, 120, 301)], "std 301"),
        ([row(100, 130, 120, 11.9)], "std 11.9"),
        ([row(7, 7, 7, 0)], "band B8 is 7 everywhere"),
        ([row(0, 255, 120, 60)] * 2, "the data have 2 bands and the backbone takes 1; set in_chans=2"),
        ([], ""),
    ],
)
def test_statistics_that_do_not_fit(rows, said):
    found = misfit(rows, [120.0], [60.0])
    assert said in found[0] if said else found == []


def test_a_class_that_training_never_sees_is_named(own, capsys):
    """Masks of 0 and 255, as binary ones often are: 255 is ignored and the object never learnt."""
    for path in (own / "mine" / "masks" / "train").iterdir():
        Image.fromarray(255 * np.asarray(Image.open(path))).save(path)
    (own / "copy.py").write_text(OWN_MASKS.read_text())
    assert main(["data", "check", str(own / "copy.py")]) == 2
    error = capsys.readouterr().err
    assert "train has no pixels of object (255 is ignored: masks of 0 and 255 need label_map={0: 0, 255: 1})" in error
    text = OWN_MASKS.read_text().replace("training=True,", "training=True, label_map={0: 0, 255: 1},")
    (own / "copy.py").write_text(text)
    assert main(["data", "check", str(own / "copy.py")]) == 0


def test_small_values_keep_their_digits(own, capsys):
    """Reflectance from 0 to 1 with a deviation that three decimals would round to 0."""
    values = np.random.default_rng(0).normal(0.02, 0.0002, (40, 50, 3)).astype(np.float32)
    for split in ("train", "val"):
        folder = own / "mine" / "images" / split
        for path in folder.iterdir():
            path.unlink()
        np.save(folder / "0.npy", values)
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(own / "mine" / "masks" / split / "0.png")
    suffixes = [f"{part}_dataloader.dataset.image_suffix=.npy" for part in ("train", "val")]
    main(["data", "check", str(OWN_MASKS), *suffixes, "--json"])
    found = json.loads(capsys.readouterr().out)["train"]
    assert [r["std"] for r in found["bands"]] == pytest.approx(values.std((0, 1), dtype=float), rel=1e-4)
    assert "0.0002" in found["misfit"][0]


# masks that are not there


def raster(own: Path, **options) -> RasterSegDataset:
    return RasterSegDataset(
        "mine/images/train",
        "mine/masks/train",
        ["a", "b"],
        **{"image_suffix": ".jpg", "mask_suffix": ".png", **options},
    )


def test_advice_about_missing_masks(own):
    folder = own / "mine" / "masks" / "train"
    with pytest.raises(
        InputError, match=r"4 of 4 images have no mask: .*/0\.tif, .* not found; set mask_suffix='\.png'$"
    ):
        raster(own, mask_suffix=".tif")
    (folder / "2.png").unlink()
    with pytest.raises(InputError, match=r"1 of 4 images have no mask: .*/2\.png not found; add them, or leave their"):
        raster(own)
    for n in (0, 1, 3):
        (folder / f"{n}.png").rename(folder / f"{n}1.png")  # its name begins alike and it is of no image
    with pytest.raises(InputError, match=r"not found; .*masks/train holds 01\.png, 11\.png, 31\.png$"):
        raster(own)
    for path in folder.iterdir():
        path.rename(folder / f"{path.stem[0]}_label.png")
    with pytest.raises(InputError, match=r"set mask_suffix='_label\.png'"):
        raster(own)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(InputError, match="masks/train holds nothing"):
        raster(own)


# base files


@pytest.fixture
def derived(tmp_path):
    """Write a config on top of a base file whose validation set is of another type."""
    (tmp_path / "base.py").write_text(
        "from visadapt.datasets.dubai_aerial import DubaiAerial\n"
        "val_dataloader = dict(batch_size=4, dataset=dict(type=DubaiAerial, split='test', tile=256))\n"
        "val_cfg = dict()\nval_evaluator = dict(type='SegmentationMetric')\n"
    )
    head = (
        "from mmengine.config import read_base\n"
        "from visadapt.datasets.raster import RasterSegDataset\n"
        "with read_base():\n    from .{base} import *\n"
        "model = dict(type='Segmenter')\n"
    )

    def written(line: str, base: str = "base") -> Path:
        (tmp_path / "mine.py").write_text(head.format(base=base) + line)
        return tmp_path / "mine.py"

    return written


def test_a_missing_base_file_is_named_with_its_near_misses(derived, tmp_path):
    with pytest.raises(InputError) as caught:
        config.load(derived("", base="bsae"))
    message = str(caught.value)
    assert message.endswith(f"its base file {tmp_path / 'bsae.py'} not found (did you mean 'base.py'?)")
    with pytest.raises(InputError, match=rf"its base file {tmp_path.parent}/gone/base\.py not found$"):
        config.load(derived("", base=".gone.base"))


def test_arguments_of_a_base_file_that_another_type_does_not_take(derived):
    own = "dict(dataset=dict({}type=RasterSegDataset, image_dir='x', mask_dir='y', classes=['a'], tlie=3))"
    for how in ("update({})", "merge({})"):
        with pytest.raises(InputError) as caught:
            config.load(derived(f"val_dataloader.{how.format(own.format(''))}\n"))
        message = str(caught.value)
        assert "has no argument 'split', which a base file gives and update() keeps; assign the dict anew" in message
        assert "has no argument 'tlie' (did you mean 'tile'?)" in message and "\n" not in message
    whole = own.replace(", tlie=3", "").format("_delete_=True, ")
    found = config.load(derived(f"val_dataloader.merge({whole})\n")).val_dataloader
    assert found.batch_size == 4 and "split" not in found.dataset
    anew = whole.removeprefix("dict(dataset=").removesuffix(")").replace("_delete_=True, ", "")
    assert config.load(derived(f"val_dataloader['dataset'] = {anew}\n")).val_dataloader == found


def test_what_an_override_adds_is_of_no_base_file(derived):
    path = derived("")
    with pytest.raises(InputError, match="DubaiAerial has no argument 'nope'; it is one of"):
        config.load(path, ["val_dataloader.dataset={'type': 'DubaiAerial', 'nope': 1}"])
