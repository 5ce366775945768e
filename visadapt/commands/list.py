"""Show what is there: adapters, backbones, heads, tasks and datasets."""

from __future__ import annotations

import argparse
import ast
import re
from typing import Any

from .. import registry
from ._output import print_json, print_table

GROUPS = {
    "adapters": registry.ADAPTERS,
    "backbones": registry.BACKBONES,
    "heads": registry.HEADS,
    "tasks": registry.TASKS,
    "datasets": registry.DATASETS,
}
REPOSITORY = registry.ROOT.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", choices=GROUPS, help="one group; all of them by default")
    parser.add_argument("--json", action="store_true", help="print one list of objects")


def run(args: argparse.Namespace) -> int:
    groups = [args.group] if args.group else list(GROUPS)
    configs, cases = read_configs(), read_cases()
    found = {group: [row(group, entry, configs, cases) for entry in GROUPS[group].entries()] for group in groups}
    if args.json:
        print_json([entry for group in groups for entry in found[group]])
        return 0
    for i, group in enumerate(groups):
        print(f"{chr(10) * (i > 0)}{group}")
        columns = ("name", "kinds", "mergeable", "needs", "paper") if group == "adapters" else ("name", "summary")
        print_table(found[group], columns)
    return 0


def read_configs() -> dict[str, set[str]]:
    """Words of every config file of the repository, by its path; an installed package has none."""
    folder = REPOSITORY / "configs"
    return {
        str(path.relative_to(REPOSITORY)): set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*/*.py"))
    }


def read_cases() -> dict[str, dict[str, tuple[str, ...]]]:
    """For each adapter of the conformance suite, its backbones and what they offer; nothing in an installed package."""
    path = REPOSITORY / "tests" / "cases.py"
    if not path.exists():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotated = (n for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
    backbones = next((ast.literal_eval(n.value) for n in annotated if n.target.id == "CAPABILITIES"), {})
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    rows = (c.args[0] for c in calls if c.func.id == "Case" and c.args)
    return {name.value: backbones for name in rows if isinstance(name, ast.Constant)}


def row(group: str, entry: registry.Entry, configs: dict[str, set[str]], cases: dict[str, Any]) -> dict[str, Any]:
    """What is known of one entry of a registry without importing it.

    A tested backbone is one that the conformance suite runs the adapter on: it has all that the adapter needs.
    """
    needs = set(entry.attributes.get("needs", ()))
    backbones = cases.get(entry.name, {}) if group == "adapters" else {}
    return {
        "name": entry.name,
        "group": group,
        "summary": entry.doc,
        "kinds": list(entry.attributes.get("kinds", ())),
        "paper": entry.attributes.get("paper", ""),
        "mergeable": bool(entry.attributes.get("mergeable", False)),
        "needs": sorted(needs),
        "tested_backbones": [name for name, offers in backbones.items() if needs <= set(offers)],
        "configs": [path for path, words in configs.items() if entry.name in words],
    }
