"""Show what is there: adapters, backbones, heads, tasks and datasets."""

from __future__ import annotations

import argparse
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
    configs = read_configs()
    found = {group: rows(group, configs) for group in groups}
    if args.json:
        print_json([row for group in groups for row in found[group]])
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


def rows(group: str, configs: dict[str, set[str]]) -> list[dict[str, Any]]:
    """One row per entry of a registry, read from the sources without importing them."""
    return [
        {
            "name": entry.name,
            "group": group,
            "summary": entry.doc,
            "kinds": list(entry.attributes.get("kinds", ())),
            "paper": entry.attributes.get("paper", ""),
            "mergeable": bool(entry.attributes.get("mergeable", False)),
            "needs": sorted(entry.attributes.get("needs", ())),
            "tested_backbones": [],
            "configs": [path for path, words in configs.items() if entry.name in words],
        }
        for entry in GROUPS[group].entries()
    ]
