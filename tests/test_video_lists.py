"""Where the clips of published data sets lie, and clips in folders and lists."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from visadapt.datasets.base import Draw
from visadapt.datasets.video_lists import ClipFolder, ClipList
from visadapt.datasets.video_sets import HMDB51, UCF101, Kinetics, SomethingSomethingV2
from visadapt.errors import InputError
from visadapt.registry import DATASETS


def touch(root: Path, *names: str) -> Path:
    """Videos that are found and never read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def frames(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((8, 10, 3), 10 * i, np.uint8))
    return folder


def found(data) -> list[tuple[str, int]]:
    return [(Path(p).name, label) for p, label in zip(data.paths, data.labels)]


# folders and lists


def test_class_folders_hold_videos_and_folders_of_frames(tmp_path):
    touch(tmp_path, "run/b.mp4", "run/deep/a.AVI", "walk/c.webm", "walk/notes.txt", ".hidden/d.mp4")
    frames(tmp_path / "walk" / "e")
    data = ClipFolder(tmp_path, num_frames=2)
    assert data.classes == ("run", "walk") == data.metainfo["classes"] and data.num_frames == 2
    assert found(data) == [("b.mp4", 0), ("a.AVI", 0), ("c.webm", 1), ("e", 1)]
    assert data[3]["inputs"].shape == (2, 3, 8, 10) and data[3]["label"] == 1
    listed = ClipFolder(tmp_path, list_file=write(tmp_path / "list.txt", "walk/e\nrun/b.mp4\n"))
    assert found(listed) == [("e", 1), ("b.mp4", 0)]


def test_splits_share_their_classes(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/b/3.mp4")
    assert found(ClipFolder(tmp_path, "train")) == [("1.mp4", 0), ("2.mp4", 1)]
    val = ClipFolder(tmp_path, "val")
    assert found(val) == [("3.mp4", 1)] and val.classes == ("a", "b")
    for others in ((), ("other/c/4.mp4",)):
        with pytest.raises(InputError, match="folders of splits in place of classes; give split='train'"):
            ClipFolder(touch(tmp_path, *others))
    with pytest.raises(InputError, match="in place of classes; give split='val'"):
        ClipFolder(touch(tmp_path / "only", "val/b/3.mp4"))
    assert ClipFolder(touch(tmp_path / "vehicles", "bus/1.mp4", "train/2.mp4")).classes == ("bus", "train")


def test_bad_folders_are_refused(tmp_path):
    touch(tmp_path, "a/1.mp4")
    for options, message in (
        (dict(split="dev"), "has no split 'dev'; it is one of: test, train, val"),
        (dict(split="val"), "no folder .*val; put clips in"),
        (dict(list_file=write(tmp_path / "l.txt", "b/1.mp4")), r"l\.txt:1: no class folder 'b'"),
        (dict(list_file=write(tmp_path / "m.txt", "a/2.mp4")), r"1 of 1 listed clips do not exist: .*2\.mp4"),
    ):
        with pytest.raises(InputError, match=message):
            ClipFolder(tmp_path, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="class folders without a clip: empty"):
        ClipFolder(tmp_path)
    with pytest.raises(InputError, match="has no class folders"):
        ClipFolder(tmp_path / "empty")
    cv2.imwrite(str(tmp_path / "empty" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="holds pictures; the frames of a clip need a folder"):
        ClipFolder(tmp_path)


def test_lists(tmp_path):
    touch(tmp_path / "videos", "a b.mp4", "c.mp4")
    data = ClipList(write(tmp_path / "list.txt", "a b.mp4 2\nc.mp4 0\n"), tmp_path / "videos")
    assert found(data) == [("a b.mp4", 2), ("c.mp4", 0)] and data.classes == ("0", "1", "2")
    named = ClipList(write(tmp_path / "videos" / "n.txt", "c.mp4 run\n"), classes=["jump", "run"])
    assert found(named) == [("c.mp4", 1)]
    for text, message in (("c.mp4", r":1: 'c\.mp4' has no label"), ("c.mp4 7", "label '7' is none of the 2 classes")):
        with pytest.raises(InputError, match=message):
            ClipList(write(tmp_path / "bad.txt", text), tmp_path / "videos", classes=["jump", "run"])
    with pytest.raises(InputError, match=r"1 of 1 listed clips do not exist: .*gone\.mp4"):
        ClipList(write(tmp_path / "bad.txt", "gone.mp4 0"), tmp_path / "videos")


def test_lists_of_frame_folders_may_count_the_frames(tmp_path):
    for name in ("run/a", "run/b", "run/b 7", "walk"):
        frames(tmp_path / name)
    data = ClipList(write(tmp_path / "l.txt", "run/a 4 0\nrun/b 7 1\nrun/b 7 4 1\nwalk\t4\t0\n"))
    assert [str(Path(p).relative_to(tmp_path)) for p in data.paths] == ["run/a", "run/b 7", "run/b 7", "walk"]
    assert data.labels == [0, 1, 1, 0] and data[0]["inputs"].shape == (8, 3, 8, 10)
    with pytest.raises(InputError, match=r"1 of 1 listed clips do not exist: .*run/c 4;"):
        ClipList(write(tmp_path / "bad.txt", "run/c 4 0\n"))
    write(tmp_path / "train.txt", "a 4 0\n")
    assert found(Kinetics("train", tmp_path, video_dir="run")) == [("a", 0)]


@pytest.mark.parametrize("line", ["path,label", "c.mp4,0", "c.mp4, 0", "a b.mp4,run", "a b.mp4 , run"])
def test_commas_in_place_of_blanks_are_told(tmp_path, line):
    touch(tmp_path, "a b.mp4", "c.mp4", "x.mp4,y.mp4")
    assert found(ClipList(write(tmp_path / "l.txt", "x.mp4,y.mp4 0"))) == [("x.mp4,y.mp4", 0)]
    with pytest.raises(InputError, match=rf"l\.txt:2: '{line}' has no label; .* with a blank in place of the comma$"):
        ClipList(write(tmp_path / "l.txt", f"# clips\n{line}\n"))


def test_labels_that_do_not_start_at_0_are_warned_of(tmp_path):
    touch(tmp_path, "a.mp4", "c.mp4")
    source = write(tmp_path / "l.txt", "a.mp4 1\nc.mp4 2\n")
    with pytest.warns(UserWarning, match=r"l\.txt: labels start at 1 .* or give classes=\['1', '2', \.\.\.\]$"):
        assert ClipList(source).labels == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ClipList(source, classes=["1", "2"]).labels == [0, 1]
        assert ClipList(source, classes=["up", "left", "right"]).labels == [1, 2]


@pytest.mark.parametrize("ending", [" 0", "\t0", ",0", ", run"])
def test_labels_in_the_list_of_class_folders_are_told(tmp_path, ending):
    touch(tmp_path, "run/a b.mp4")
    assert found(ClipFolder(tmp_path, list_file=write(tmp_path / "l.txt", "run/a b.mp4"))) == [("a b.mp4", 0)]
    with pytest.raises(InputError, match=r"l\.txt:1: .* ends in a label; lines of ClipFolder are .* or take ClipList$"):
        ClipFolder(tmp_path, list_file=write(tmp_path / "l.txt", f"run/a b.mp4{ending}"))


def test_where_a_list_is_looked_for_is_told_with_the_split(tmp_path):
    touch(tmp_path, "train/a/1.mp4")
    with pytest.raises(
        InputError, match=rf"list file 'no\.txt' not found.*give its path, or its path below {tmp_path}/train$"
    ):
        ClipFolder(tmp_path, "train", list_file="no.txt")
    with pytest.raises(InputError, match=r"give its path, or its path below the data set's root$"):
        ClipList("no.txt")


# published sets


@pytest.fixture
def kinetics(tmp_path):
    touch(tmp_path, "val/abseiling/abc_000010_000020.mp4", "val/air_drumming/-x_y_000000_000010.mp4")
    rows = ["air drumming,-x_y,0.0,10.0,val", "abseiling,abc,10,20,val", "abseiling,gone,3,13,val"]
    write(tmp_path / "val.csv", "label,youtube_id,time_start,time_end,split\n" + "\n".join(rows))
    return tmp_path


def test_kinetics(kinetics):
    with pytest.raises(InputError, match=r"Kinetics: 1 of 3 listed clips do not exist: .*gone_000003_000013\.mp4"):
        Kinetics("val", kinetics)
    with pytest.warns(UserWarning, match=r"Kinetics: 1 of 3 listed videos are not there and left out: .*gone_000003"):
        data = Kinetics("val", kinetics, missing="skip")
    assert data.classes == ("abseiling", "air drumming")
    assert found(data) == [("-x_y_000000_000010.mp4", 1), ("abc_000010_000020.mp4", 0)]
    assert data.absent == [str(kinetics / "val/abseiling/gone_000003_000013.mp4")]
    write(kinetics / "train.txt", "abseiling/abc_000010_000020.mp4 0\n")
    assert found(Kinetics("train", kinetics, video_dir="val")) == [("abc_000010_000020.mp4", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("youtube_id,time_start,time_end,split\nabc,10,20,test", r"val\.csv: no column 'label'"),
        ("label,youtube_id,time_start,time_end,split\na,abc,ten,20,val", "time_start and time_end are whole seconds"),
        ("label,youtube_id,time_start,time_end,split\na,abc,1.5,20,val", "are whole seconds: .*'1.5'"),
        ("label,youtube_id,time_start,time_end,split\na,abc,1,2,val\na,abc,1", "are whole seconds"),
        ("label,youtube_id,time_start,time_end,split\n", "has no rows"),
    ],
)
def test_bad_tables_are_refused(kinetics, text, message):
    write(kinetics / "val.csv", text)
    with pytest.raises(InputError, match=message):
        Kinetics("val", kinetics)
    with pytest.raises(InputError, match=r"train\.txt"):
        Kinetics("train", kinetics)


@pytest.mark.filterwarnings("ignore:Kinetics")
def test_options_of_published_sets_are_checked(kinetics):
    with pytest.raises(InputError, match="missing is 'refuse' or 'skip', got 'drop'"):
        Kinetics("val", kinetics, missing="drop")
    with pytest.raises(InputError, match="has no split 'test'"):
        Kinetics("test", kinetics)
    with pytest.raises(InputError, match="Kinetics has no clips"):
        Kinetics("val", kinetics, missing="skip", video_dir="nowhere")


def something(root: Path, labels: dict, entries: list, prefix: str = "") -> Path:
    write(root / f"{prefix}labels.json", json.dumps(labels))
    write(root / f"{prefix}train.json", json.dumps(entries))
    return root


def test_something_something(tmp_path):
    touch(tmp_path, *(f"20bn-something-something-v2/{i}.webm" for i in (7, 8)))
    labels = {"Pushing something": "1", "Holding something next to something": "0"}
    entries = [
        dict(id="7", label="holding a cup next to a can", template="Holding [something] next to [something]"),
        dict(id=8, label="Pushing something"),
    ]
    for prefix in ("", "something-something-v2-", "labels/"):
        data = SomethingSomethingV2("train", something(tmp_path, labels, entries, prefix))
        assert found(data) == [("7.webm", 0), ("8.webm", 1)]
        assert data.classes == ("Holding something next to something", "Pushing something")
    for bad, message in (
        (dict(id="9", label="Flying"), "entry 0: 'Flying' is none of the 2 classes"),
        (dict(id="9"), "entry 0 has no id, or neither"),
        (dict(id="9", label="Pushing something"), r"listed clips do not exist: .*9\.webm"),
    ):
        with pytest.raises(InputError, match=message):
            SomethingSomethingV2("train", something(tmp_path, labels, [bad]))
    with pytest.raises(InputError, match="not 0 to 1, each once"):
        SomethingSomethingV2("train", something(tmp_path, {"a": 0, "b": 2}, []))
    with pytest.raises(InputError, match=r"none of validation\.json, .* is in"):
        SomethingSomethingV2("val", tmp_path)
    something(tmp_path, labels, [])
    write(tmp_path / "train.json", "[{]")
    with pytest.raises(InputError, match=r"train\.json:1: not json"):
        SomethingSomethingV2("train", tmp_path)
    write(tmp_path / "train.json", "17")
    with pytest.raises(InputError, match=r"train\.json must hold one list of videos"):
        SomethingSomethingV2("train", tmp_path)


def test_something_something_exchanges_left_and_right(tmp_path):
    for i in range(3):
        frames(tmp_path / "20bn-something-something-v2" / f"{i}.webm")
    labels = {f"class {i}": str(i) for i in range(174)}
    entries = [dict(id=str(i), template=f"class {c}") for i, c in enumerate((86, 94, 5))]
    data = SomethingSomethingV2("train", something(tmp_path, labels, entries), flip=1.0, training=True)
    assert [data[Draw(0, i)]["label"] for i in range(3)] == [87, 93, 5]
    something(tmp_path, {f"class {i}": i for i in range(100)}, entries[1:])
    with pytest.raises(InputError, match=r"label 166, there are 100 classes; give flip_labels .* or \{\} where"):
        SomethingSomethingV2("train", tmp_path, flip=0.5, training=True)
    with pytest.raises(InputError, match="HorizontalFlip mirrors clips"):
        SomethingSomethingV2("train", tmp_path, transform=[dict(type="HorizontalFlip")], training=True)


def test_ucf101(tmp_path):
    touch(tmp_path, "UCF-101/Archery/v_a.avi", "UCF-101/Archery/v_b.avi", "UCF-101/Biking/v_c.avi")
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 Archery\n2 Biking\n")
    write(lists / "trainlist01.txt", "Biking/v_c.avi 2\nArchery/v_a.avi 1\n")
    write(lists / "testlist01.txt", "Archery/v_b.avi\n")
    assert found(UCF101("train1", tmp_path)) == [("v_c.avi", 1), ("v_a.avi", 0)]
    assert found(UCF101("test1", tmp_path)) == [("v_b.avi", 0)]
    with pytest.raises(InputError, match=r"has no split 'train' \(did you mean 'train"):
        UCF101("train", tmp_path)
    write(lists / "trainlist02.txt", "Biking/v_c.avi 1\n")
    with pytest.raises(InputError, match=r"trainlist02\.txt:1: label 1 is not that of 'Biking'"):
        UCF101("train2", tmp_path)
    write(lists / "classInd.txt", "0 Archery\n1 Biking\n")
    with pytest.raises(InputError, match="counted up from 1"):
        UCF101("test1", tmp_path)


def test_hmdb51(tmp_path):
    touch(tmp_path, *(f"videos/{c}/{c}{i}.avi" for c in ("hug", "run") for i in range(3)))
    lists = tmp_path / "testTrainMulti_7030_splits"
    for c in ("run", "hug"):
        write(lists / f"{c}_test_split1.txt", f"{c}0.avi 1 \n{c}1.avi 2 \n{c}2.avi 0 \n")
    train, test = HMDB51("train1", tmp_path), HMDB51("test1", tmp_path)
    assert found(train) == [("hug0.avi", 0), ("run0.avi", 1)] and train.classes == ("hug", "run")
    assert found(test) == [("hug1.avi", 0), ("run1.avi", 1)]
    with pytest.raises(InputError, match=r"no list .*_test_split2"):
        HMDB51("train2", tmp_path)
    write(lists / "run_test_split1.txt", "run0.avi 3\n")
    with pytest.raises(InputError, match=r"run_test_split1\.txt:1: mark '3' is none of"):
        HMDB51("train1", tmp_path)


def test_sets_are_built_from_configs(tmp_path):
    frames(tmp_path / "a" / "0")
    data = DATASETS.build(dict(type="ClipFolder", root=str(tmp_path), num_frames=3, size=4, crops=3))
    assert data[0]["inputs"].shape == (9, 3, 4, 4)
    with pytest.raises(InputError, match=r"ClipFolder has no argument 'frames' .*did you mean"):
        DATASETS.build(dict(type="ClipFolder", root=str(tmp_path), frames=3))
    with pytest.raises(InputError, match="HMDB51 needs the argument split"):
        DATASETS.build(dict(type="HMDB51"))
