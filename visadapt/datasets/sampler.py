"""A sampler that hands the epoch to the data set and can start in the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from itertools import chain, count, islice

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from ..errors import InputError
from .base import Draw


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler):
    """Yields Draw(epoch, index); the order depends on (seed, epoch) alone.

    Args:
        dataset: only its length matters.
        shuffle: a new order in each epoch; False keeps the order of the data set.
        seed: equal on all ranks; None agrees on a random one.
        round_up: repeat samples from the start of the order until each rank has equally many.
        endless: go on with the next epoch at the end of one, for loops that count iterations; implies `round_up`.

    Raises:
        InputError: the data set is empty.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        endless: bool = False,
    ):
        if len(dataset) == 0:
            raise InputError("EpochSampler: the data set is empty")
        self.rank, self.world_size = get_dist_info()
        self.size, self.shuffle, self.round_up, self.endless = len(dataset), shuffle, round_up or endless, endless
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self._skip = 0
        per_rank = self.size if self.round_up else self.size - self.rank
        self.num_samples = math.ceil(per_rank / self.world_size)

    def __len__(self) -> int:
        """Samples of this rank in one epoch."""
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Leave out the first samples of the next iteration, and of that one only.

        Args:
            num_samples: samples of this rank, counted from the start of the epoch that was set; with `endless` from the
                start of training.

        Raises:
            InputError: a negative number, or one beyond the epoch without `endless`.
        """
        if num_samples < 0 or (num_samples > self.num_samples and not self.endless):
            raise InputError(
                f"EpochSampler cannot skip {num_samples} of {self.num_samples} samples; a loop that counts iterations "
                "needs EpochSampler(endless=True)"
            )
        self._skip = num_samples

    def __iter__(self) -> Iterator[Draw]:
        skip, self._skip = self._skip, 0
        if not self.endless:
            return iter(self._draws(self.epoch)[skip:])
        whole, rest = divmod(skip, self.num_samples)
        return islice(chain.from_iterable(map(self._draws, count(self.epoch + whole))), rest, None)

    def _draws(self, epoch: int) -> list[Draw]:
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        if self.round_up:
            order = np.resize(order, self.num_samples * self.world_size)
        return [Draw(epoch, int(i)) for i in order[self.rank :: self.world_size]]
