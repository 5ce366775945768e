"""Where a training run stands, for adapters whose rank, mask or route changes with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Progress:
    """One optimizer step of a run.

    Attributes:
        step: optimizer steps done before this one.
        total: optimizer steps of the whole run.
        epoch: epochs done before this step.
        epochs: epochs of the whole run.
        generator: on the CPU, seeded by run and step alone: the same draws on every process and after a resume.
        lr: the optimizer's learning rate, without factors of single groups; 0 where none drives the run.
    """

    step: int
    total: int
    epoch: int
    epochs: int
    generator: torch.Generator
    lr: float = 0.0
