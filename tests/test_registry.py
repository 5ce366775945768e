"""Registries that know their entries by reading sources."""

from __future__ import annotations

import subprocess
import sys

import pytest

from visadapt import registry
from visadapt.errors import InputError, hint
from visadapt.registry import ADAPTERS, HEADS, Registry, unknown_arguments

SOURCE = '''
"""A package file that must not be imported for listing."""
raise RuntimeError("imported")

@THINGS.register_module()
class Wheel:
    """Rolls.

    More.
    """

    kinds = ("delta",)
    needs = frozenset({"tokens"})
    mergeable: bool = True
    computed = len("abc")

class Unregistered:
    pass
'''


class Made:
    def __init__(self, width: int, depth: int = 2) -> None:
        self.width, self.depth = width, depth


class Open:
    def __init__(self, **anything: int) -> None:
        pass


@pytest.fixture
def things(tmp_path, monkeypatch) -> Registry:
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "wheel.py").write_text(SOURCE)
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    return Registry("THINGS", "thing", "things")


def test_entries_are_read_without_import(things):
    (entry,) = things.entries()
    assert (entry.name, entry.module, entry.doc) == ("Wheel", "visadapt.things.wheel", "Rolls.")
    assert entry.attributes == {"kinds": ("delta",), "needs": {"tokens"}, "mergeable": True}


def test_listing_imports_no_torch():
    code = (
        "import sys; from visadapt import registry as r; assert r.ADAPTERS.names(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_own_classes_join_and_twins_are_refused(things):
    things.register_module()(Made)
    assert things.names() == ["Made", "Wheel"] and things.get("Made") is Made
    things.register_module()(Made)
    twin = type("Made", (), {"__module__": "elsewhere"})
    with pytest.raises(InputError, match=r"thing 'Made' is registered twice: .*test_registry, elsewhere"):
        things.register_module()(twin)


def test_get_takes_names_paths_and_classes():
    linear = HEADS.get("LinearHead")
    assert HEADS.get("visadapt.heads.linear.LinearHead") is linear and HEADS.get(linear) is linear


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LinearHaed", r"unknown head 'LinearHaed' \(did you mean 'LinearHead'"),
        ("Zzz", "unknown head 'Zzz'; it is one of: ASPPHead, CosineHead, .*UPerHead"),
        ("visadapt.heads.linear.Nope", "head 'visadapt.heads.linear.Nope' cannot be imported: .*Nope"),
        ("no.such.module.Nope", "cannot be imported: No module named 'no'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        HEADS.get(name)


def test_tuners_of_peft_are_named_by_how_they_are_written():
    for name, tuner in (("DoRA", "DoRA"), ("vera", "VeRA")):
        with pytest.raises(InputError, match=rf"; write dict\(type='PEFT', tuner='{tuner}'\)"):
            ADAPTERS.get(name)
    with pytest.raises(InputError, match=r"did you mean .*'LoRA'"):  # an adapter of its own comes first
        ADAPTERS.get("LoRa")


def test_build(things):
    made = things.build({"type": Made, "width": 3}, depth=5)
    assert (made.width, made.depth) == (3, 5)
    assert things.build(made) is made


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"width": 3}, r"a thing is given as dict\(type=...\), got keys \['width'\]"),
        ({"type": Made, "width": 3, "dept": 1}, r"Made has no argument 'dept' \(did you mean 'depth'\?\)"),
        ({"type": Made}, "Made needs the argument width"),
    ],
)
def test_build_refuses(things, cfg, message):
    with pytest.raises(InputError, match=message):
        things.build(cfg)


def test_open_constructors_take_any_argument():
    assert unknown_arguments(Open, ["x"]) == []
    assert len(unknown_arguments(Made, ["x", "width", "y"])) == 2


def test_hint():
    assert hint("rnak", ["rank", "alpha"]) == " (did you mean 'rank'?)"
    assert hint("LORA", ["LoRA"]) == " (did you mean 'LoRA'?)"
    assert hint("x", []) == ""
    assert hint("zzz", [f"n{i:02d}" for i in range(20)], limit=2) == "; it is one of: n00, n01, … (20 in all)"
