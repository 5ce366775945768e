"""AdaLoRA around PEFT's layers: its regulariser, and its schedule of ranks with PEFT's own allocator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.progress import Progress
from ...errors import InputError
from .low_rank import orthogonality


class RankSchedule(nn.Module):
    """Which of the triplets (a row of A, a value of E, a column of B) of all sites count; the E of the others are 0.

    After n steps the triplets that count are the init_r per site up to `tinit`, then target + (init - target) (1 - (n -
    tinit) / (total - tfinal - tinit))^3 in total, chosen anew every `deltaT` steps by importance, and target_r times
    the number of sites from total - tfinal on, which stay. Shapes never change.

    Our design where PEFT leaves it to the caller: n counts from 1, so that the target is reached without `tfinal` too,
    and `total` is the length of the run. What the allocator knows lies in buffers, for checkpoints but not for adapter
    files, so that a run that is resumed goes on as it was.

    Args:
        config: AdaLoraConfig of PEFT.

    Raises:
        InputError: numbers without which there is no schedule.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = self.config = config
        if not 1 <= c.target_r < c.init_r:
            raise InputError(f"PEFT 'AdaLoRA': target_r={c.target_r} must be at least 1 and below init_r={c.init_r}")
        if not (0 < c.beta1 < 1 and 0 < c.beta2 < 1):
            raise InputError(f"PEFT 'AdaLoRA': beta1={c.beta1} and beta2={c.beta2} must lie between 0 and 1")
        if min(c.deltaT, c.tinit + 1, c.tfinal + 1) < 1:
            raise InputError(
                f"PEFT 'AdaLoRA': deltaT={c.deltaT} must be 1 or more, tinit={c.tinit} and tfinal={c.tfinal} 0 or more"
            )

    def start(self, pieces: nn.ModuleDict) -> None:
        count = sum(p.numel() for p in pieces.parameters())
        self.register_buffer("sensitivity", torch.zeros(count))
        self.register_buffer("uncertainty", torch.zeros(count))
        self.register_buffer("kept", torch.ones(sum(len(e) for e in _values(pieces)), dtype=torch.bool))

    def loss(self, pieces: nn.ModuleDict) -> Tensor | None:
        """How far A and B are from orthonormal, weighted; None where the weight is 0."""
        if not self.config.orth_reg_weight:
            return None
        named = pieces.named_parameters()
        parts = [p if ".lora_A." in n else p.T for n, p in named if ".lora_A." in n or ".lora_B." in n]
        return self.config.orth_reg_weight * orthogonality(parts)

    def check(self, progress: Progress) -> None:
        """Refuse a run that is too short."""
        c = self.config
        if c.tinit >= progress.total - c.tfinal:
            raise InputError(
                f"PEFT 'AdaLoRA': ranks fall between step tinit={c.tinit} and tfinal={c.tfinal} steps before the end, "
                f"and the run has {progress.total} steps; lower tinit or tfinal"
            )

    @torch.no_grad()
    def update(self, pieces: nn.ModuleDict, progress: Progress) -> None:
        """After the update of the optimizer, with the gradients still there."""
        from peft.tuners.adalora.layer import RankAllocator

        if not all(p.requires_grad for p in pieces.parameters()):
            return
        self.config.total_step = progress.total
        allocator = RankAllocator(pieces, self.config, "default")
        step, last = progress.step + 1, progress.total - self.config.tfinal
        if step > last:
            self.mask(pieces)
            return
        named = dict(pieces.named_parameters())
        sizes = [p.numel() for p in named.values()]
        averages = (allocator.exp_avg_ipt, self.sensitivity), (allocator.exp_avg_unc, self.uncertainty)
        allocator.ipt = dict.fromkeys(named)
        for of_allocator, ours in averages:
            of_allocator |= {n: part.view_as(p) for (n, p), part in zip(named.items(), ours.split(sizes))}
        _, chosen = allocator.update_and_allocate(pieces, step, force_mask=step == last)
        for of_allocator, ours in averages:
            ours.copy_(torch.cat([of_allocator[n].flatten() for n in named]))
        if chosen:
            self.kept.copy_(torch.tensor([kept for site in chosen.values() for kept in site]))

    @torch.no_grad()
    def mask(self, pieces: nn.ModuleDict) -> None:
        """Put the triplets out that do not count."""
        values = _values(pieces)
        for value, kept in zip(values, self.kept.split([len(v) for v in values])):
            value.masked_fill_(~kept[:, None], 0)


def _values(pieces: nn.ModuleDict) -> list[nn.Parameter]:
    """E (r, 1) of every site."""
    return [p for n, p in pieces.named_parameters() if ".lora_E." in n]
