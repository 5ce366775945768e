"""A training of a tiny model with the hook, optimizer constructor and wrapper of real runs, batch by batch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from cases import TINY
from torch import nn

from visadapt.core.adapted import Adapted
from visadapt.hooks.lifecycle import Lifecycle
from visadapt.optim.groups import TrainableGroups
from visadapt.optim.wrapper import AutocastOptimWrapper
from visadapt.testing import tiny_backbone

BACKBONE = tiny_backbone(TINY["vit"])
D = 48
TARGETS = ("q", "fc2")


def first(adapter):
    return next(iter(adapter.pieces.values()))


class Model(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapted = Adapted(copy.deepcopy(BACKBONE))
        self.adapted.add("a", adapter)
        self.head = nn.Linear(D, 3)
        self.adapted.set_trainable("a", heads=[self.head])

    @property
    def adapter(self):
        return self.adapted.adapters["a"]

    def loss(self, step):
        x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(self.head(self.adapted(x).native), torch.tensor([step % 3, (step + 1) % 3]))
        return loss + sum(self.adapted.losses().values())


class Run:
    """A training of `total` batches whose pieces are those of a real one; `look` is called after every batch."""

    def __init__(self, adapter, total=12, every=1, lr=1e-2, **optimizer):
        torch.manual_seed(0)
        self.model = Model(adapter).train()
        wrapper = dict(type=AutocastOptimWrapper, accumulative_counts=every, clip_grad=dict(max_norm=1.0))
        wrapper["optimizer"] = dict(type="AdamW", lr=lr, weight_decay=0.1) | optimizer
        self.optim_wrapper = TrainableGroups(wrapper)(self.model)
        self.optim_wrapper.initialize_count_status(self.model, 0, total)
        self.iter, self.max_iters, self.epoch, self.max_epochs, self.seed = 0, total, 0, 1, 3
        self.hook = Lifecycle()
        self.hook.before_train(self)

    @property
    def adapter(self):
        return self.model.adapter

    def go(self, stop=None, look=lambda run: None):
        while self.iter < (self.max_iters if stop is None else stop):
            self.hook.before_train_iter(self, self.iter)
            torch.manual_seed(self.iter)
            self.optim_wrapper.update_params(self.model.loss(self.iter))
            look(self)
            self.iter += 1
        if stop is None:
            self.hook.after_train(self)
        return self

    def resumed(self, adapter, **settings):
        """The same point of the run in new objects, from what a checkpoint holds."""
        other = Run(adapter, total=self.max_iters, **settings)
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        for name, parameter in self.model.named_parameters():
            other.model.get_parameter(name).grad = None if parameter.grad is None else parameter.grad.clone()
        other.optim_wrapper.load_state_dict(copy.deepcopy(self.optim_wrapper.state_dict()))
        other.optim_wrapper.initialize_count_status(other.model, self.iter, self.max_iters)
        other.iter = self.iter
        return other
