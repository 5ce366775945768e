"""What the documents say works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from visadapt import config
from visadapt.cli import COMMANDS
from visadapt.registry import TASKS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.py") if p.parent.name != "_base_")


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_links_and_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (ROOT / target).exists(), target
    assert set(re.findall(r"^visadapt (\w+)", text, re.MULTILINE)) <= set(COMMANDS)
    for path in re.findall(r"configs/\S+\.py", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_with_the_parameters_it_states(path, monkeypatch):
    """Built with random weights; the header's parameter counts are what trains."""
    monkeypatch.chdir(ROOT)
    cfg = config.load(path, [])
    cfg.model.backbone.weights = None
    with torch.device("meta" if "-l16_" in path.name else "cpu"):  # a ViT-L takes seconds to fill
        task = TASKS.build(cfg.model)
    counts = [row[3] for row in task.adapted.trainable_report(task.heads).rows]
    header = path.read_text().split('"""')[1]
    for count in counts:
        assert f"{count:,}" in header, f"{path.name} does not state {count:,} trainable parameters"
