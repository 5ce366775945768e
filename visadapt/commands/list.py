"""Show what is there: adapters, backbones, heads, tasks and datasets."""

from __future__ import annotations

import argparse
import ast
import json
import re
from dataclasses import dataclass, field
from typing import Any

from .. import registry
from ..adapters import VIT_B
from ..core.sites import Site, select
from ..errors import InputError
from ._output import print_json, print_table

GROUPS = {
    "adapters": registry.ADAPTERS,
    "backbones": registry.BACKBONES,
    "heads": registry.HEADS,
    "tasks": registry.TASKS,
    "datasets": registry.DATASETS,
}
REPOSITORY = registry.ROOT.parent
FOOTNOTE = """
vit_b_params: what trains on a ViT-B/16 with random weights and each method's defaults, coordinates, experts and ranks
that go or come later included. PEFT is one adapter for all its tuners: PEFT(tuner='DoRA'), HRA, OFT, VeRA, ..."""

COLUMNS = ("name", "kinds", "vit_b_params", "mergeable", "needs", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", choices=GROUPS, help="one group; all of them by default")
    parser.add_argument("--json", action="store_true", help="print one list of objects")


def run(args: argparse.Namespace) -> int:
    groups = [args.group] if args.group else list(GROUPS)
    configs, cases = read_configs(), read_cases()
    found = {group: [row(group, entry, configs, cases) for entry in GROUPS[group].entries()] for group in groups}
    counts = json.loads(VIT_B.read_text())
    for entry in (entry for group in groups for entry in found[group]):
        count = counts.get(entry["name"]) if entry["group"] == "adapters" else None
        entry["vit_b_params"] = count if args.json or count is None else f"{count:,}"
    if args.json:
        print_json([entry for group in groups for entry in found[group]])
        return 0
    for i, group in enumerate(groups):
        print(f"{chr(10) * (i > 0)}{group}")
        columns = COLUMNS if group == "adapters" else ("name", "summary")
        print_table(found[group], columns)
        if group == "adapters":
            print(FOOTNOTE)
    return 0


def read_configs() -> dict[str, set[str]]:
    """Words of every config file of the repository, by its path; an installed package has none."""
    folder = REPOSITORY / "configs"
    return {
        str(path.relative_to(REPOSITORY)): set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*/*.py"))
    }


@dataclass
class Cases:
    """What the conformance suite runs.

    Attributes:
        capabilities: of every backbone.
        roles: of every backbone's sites, with spaces between.
        targets: of every row of an adapter, None for those of its class.
    """

    capabilities: dict[str, tuple[str, ...]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    targets: dict[str, list[tuple[str, ...] | None]] = field(default_factory=dict)

    def backbones(self, entry: registry.Entry) -> list[str]:
        """Backbones that the suite runs an adapter on: they have what it needs and every role that a row names."""
        needs = set(entry.attributes.get("needs", ()))
        rows = [entry.attributes.get("targets", ()) if t is None else t for t in self.targets.get(entry.name, ())]
        able = [name for name, offers in self.capabilities.items() if needs <= set(offers)]
        return [name for name in able if any(_offered(row, self.roles[name].split()) for row in rows)]


def _offered(targets: tuple[str, ...], roles: list[str]) -> bool:
    """Whether each target names a site of a backbone with these roles. Paths are not known here and name none."""
    try:
        select([Site(role, role, 0, 1, 1) for role in roles], targets, None, "")
    except InputError:
        return False
    return True


def read_cases() -> Cases:
    """What `tests/cases.py` says, without running it; nothing in an installed package."""
    path = REPOSITORY / "tests" / "cases.py"
    if not path.exists():
        return Cases()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotated = [n for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    tables = {n.target.id: n.value for n in annotated if n.target.id in ("CAPABILITIES", "ROLES")}
    cases = Cases(*(ast.literal_eval(tables[name]) for name in ("CAPABILITIES", "ROLES")))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Case" and call.args:
            name, *arguments = call.args
            keywords = {k.arg: k.value for a in arguments for k in getattr(a, "keywords", ())}
            targets = ast.literal_eval(keywords["targets"]) if "targets" in keywords else None
            cases.targets.setdefault(ast.literal_eval(name), []).append(targets)
    return cases


def row(group: str, entry: registry.Entry, configs: dict[str, set[str]], cases: Cases) -> dict[str, Any]:
    """What is known of one entry of a registry without importing it.

    It needs capabilities of a backbone, and the extra of the package that its class names in `extra`.
    """
    extra = entry.attributes.get("extra")
    return {
        "name": entry.name,
        "group": group,
        "summary": entry.doc,
        "kinds": list(entry.attributes.get("kinds", ())),
        "paper": entry.attributes.get("paper", ""),
        "mergeable": bool(entry.attributes.get("mergeable", False)),
        "needs": [*sorted(entry.attributes.get("needs", ())), *([f"visadapt[{extra}]"] if extra else [])],
        "tested_backbones": cases.backbones(entry) if group == "adapters" else [],
        "configs": [path for path, words in configs.items() if entry.name in words],
    }
