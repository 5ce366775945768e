"""Polytropon and Multi-Head Routing: low-rank skills that tasks share, mixed anew for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.context import Context
from ..core.kinds import Delta
from ..core.probe import evaluating
from ..core.progress import Progress
from ..core.sites import LINEARS, Site
from ..errors import InputError, hint
from ..registry import ADAPTERS
from ._common.low_rank import require_rank

if TYPE_CHECKING:
    from ..core.adapted import Adapted

ROUTINGS = ("relaxed", "sigmoid", "rounded", "l2")


class PolySite(Delta):
    """delta of task t = s B_t A_t; A_t (rank, dim_in) and B_t (dim_out, rank) are put together from mixed parts.

    Shapes: a (splits, skills, rank, dim_in / splits), b (splits, skills, dim_out / splits, rank), logits
    (tasks, splits, skills).

    Args:
        site: a linear.
        ctx: where the task numbers of the images stand.
        options: the adapter.
    """

    random = False

    def __init__(self, site: Site, ctx: Context, options: Poly) -> None:
        super().__init__(site)
        o, splits, skills = options, options.n_splits, options.n_skills
        if site.dim_in % splits or site.dim_out % splits:
            raise InputError(f"Poly: n_splits {splits} does not divide {site.key} of {site.dim_out} x {site.dim_in}")
        require_rank("Poly", o.rank, site, (site.dim_out, site.dim_in))
        width = site.dim_in // splits
        self.a = nn.Parameter(torch.empty(splits, skills, o.rank, width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(splits, skills, site.dim_out // splits, o.rank))
        self.logits = nn.Parameter(torch.empty(o.n_tasks, splits, skills).uniform_(-1e-3, 1e-3))
        self.register_buffer("noise", torch.zeros_like(self.logits))
        self.ctx, self.scaling, self.task = ctx, o.alpha / o.rank, o.task
        self.routing, self.average_correction, self.shared_skill = o.routing, o.average_correction, o.shared_skill

    def stored(self) -> dict[str, Tensor]:
        """Without the draws of the last training step."""
        return {k: v for k, v in self.state_dict().items() if k != "noise"}

    def weights(self, tasks: Tensor | list[int]) -> Tensor:
        """(T, splits, skills): how much of each skill these T tasks take."""
        z = self.logits[tasks]
        if self.routing == "l2":
            return F.normalize(z, dim=-1)
        if self.routing == "relaxed" and self.training:
            z = z + self.noise[tasks]
        z = z.sigmoid()
        if self.routing == "rounded":
            z = z + (z.round() - z).detach()
        if self.shared_skill:
            z = torch.cat([z[..., :-1], torch.ones_like(z[..., -1:])], -1)
        if self.average_correction:
            return z * math.sqrt(z.shape[1] / z.shape[2])
        total = z.sum(-1, keepdim=True)
        # Rounded weights may all be 0: a division by nearly nothing would give gradients without bounds.
        return z / (total.clamp(min=1) if self.routing == "rounded" else total + 1e-12)

    def mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A (T, rank, dim_in) and B (T, dim_out, rank) for weights (T, splits, skills)."""
        a = torch.einsum("tsk,skri->trsi", weights, self.a).flatten(2)
        return a, torch.einsum("tsk,skor->tsor", weights, self.b).flatten(1, 2)

    def by_forward(self) -> bool:
        return self.task is None and (self.ctx.tasks is not None or len(self.logits) > 1)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        if self.task is None and len(self.logits) > 1:
            raise InputError(
                f"adapter '{self.owner}' has another weight for each of its {len(self.logits)} tasks; fix one with "
                "set_task(number) before merging"
            )
        a, b = self.mixed(self.weights([self.task or 0]))
        return a[0], b[0], self.scaling

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_forward():
            return super().forward(x)
        distinct, place = self._tasks()
        a, b = self.mixed(self.weights(distinct))
        x = x.movedim(self.site.batch_dim, 0)
        place = place.repeat(self.ctx.views)
        place = place.repeat_interleave(x.shape[0] // len(place))  # the windows of an image stand together
        thin = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a[place].mT)
        y = torch.bmm(thin, b[place].mT) * self.scaling
        return y.view(*x.shape[:-1], -1).movedim(0, self.site.batch_dim)

    def _tasks(self) -> tuple[Tensor, Tensor]:
        """The different task numbers of the batch and where each image's stands among them; found once per batch."""
        tasks, count = self.ctx.tasks, len(self.logits)
        if tasks is None:
            raise InputError(
                f"adapter '{self.owner}' was made for {count} tasks and the images have no task numbers; give the "
                "batch a field 'task' (where there is no task model: ctx.tasks), or fix one with set_task(number)"
            )
        if self.ctx.ids is not None:
            raise InputError(f"adapter '{self.owner}' is routed to images; fix its task with set_task(number) first")
        if torch.compiler.is_compiling():
            torch._assert_async(((tasks >= 0) & (tasks < count)).all(), f"task numbers are 0 to {count - 1}")
            return torch.arange(count, device=tasks.device), tasks
        key = f"{self.owner}.tasks"
        if self.ctx.values.get(key, (None,))[0] is not tasks:
            distinct, place = torch.unique(tasks, return_inverse=True)
            for task in distinct.tolist():
                _check_task(task, count)
            self.ctx.values[key] = tasks, distinct, place
        return self.ctx.values[key][1:]


def _check_task(task: int, count: int) -> None:
    if not isinstance(task, int) or not 0 <= task < count:
        raise InputError(f"Poly: no task {task!r}; n_tasks={count} are numbered 0 to {count - 1}")


@ADAPTERS.register_module()
class Poly(Adapter):
    """Skills, each a low-rank update, that several tasks share; every task and site has its own mixture of them.

    With skill k = (A_k, B_k) and a logit z[t, k] per task t, W + alpha / rank B_t A_t where A_t = sum_k w[t, k] A_k,
    B_t = sum_k w[t, k] B_k and w = sigmoid(z) / sum_k sigmoid(z). Multi-Head Routing (`n_splits` above 1) cuts the
    input of A and the output of B into equal parts, each with logits of its own: skills * rank * (dim_in + dim_out) +
    tasks * splits * skills values per site. In training the sigmoid is that of z + log(u / (1 - u)) with uniform u
    (a relaxed Bernoulli variable at temperature 1).

    The task number of each image is the batch's field `task`; every task of a batch is mixed once. `set_task` fixes one
    task for all images; then the adapter is an ordinary low-rank update that merges.

    Our design: u is drawn once per optimizer step for every task, not for every image, so that one mixture serves all
    images of a task and recomputed activations agree. The paper's recipe: 8 skills, rank 1, 64 splits, all linears,
    learning rate 1e-3 and 0.1 for logits, no weight decay. On a fused qkv name q, k and v, so that no part of the
    output lies in two of them.

    Args:
        n_tasks: number of tasks.
        n_skills: number of skills.
        n_splits: parts with a mixture of their own; it divides inputs and outputs of every site.
        rank: of every skill.
        alpha: numerator of the scaling; 1 in PEFT.
        routing: "relaxed" draws in training; "sigmoid" does not (configurations of MHR); "rounded" takes every skill
            wholly or not at all, with the gradient of the sigmoid; "l2" takes z / ||z|| for w.
        average_correction: w = sigmoid(z) sqrt(splits / skills) instead of the division by the sum.
        shared_skill: the last skill has 1 in place of its sigmoid for every task.
        router_lr_mult: learning rate of the logits over that of the skills.
        task: the fixed task; None where the batch says it.
        targets: roles of linears.
        layers: block indices.
    """

    kinds = ("delta",)
    targets = ("q", "v")
    roles = LINEARS
    paper = "Polytropon (Ponti et al., 2022), arXiv 2202.13914; n_splits: MHR (Caccia et al., 2022), arXiv 2211.03831"
    mergeable = True

    def __init__(
        self,
        n_tasks: int = 1,
        n_skills: int = 8,
        n_splits: int = 1,
        rank: int = 1,
        alpha: float = 1.0,
        routing: str = "relaxed",
        average_correction: bool = False,
        shared_skill: bool = False,
        router_lr_mult: float = 100.0,
        task: int | None = None,
        targets: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(targets, layers)
        self.require_positive(n_tasks=n_tasks, n_skills=n_skills, n_splits=n_splits, rank=rank)
        if routing not in ROUTINGS:
            raise InputError(f"Poly: no routing '{routing}'{hint(routing, ROUTINGS)}")
        if routing == "l2" and (average_correction or shared_skill):
            raise InputError("Poly: routing 'l2' has no sigmoid for average_correction or shared_skill to change")
        self.n_tasks, self.n_skills, self.n_splits = n_tasks, n_skills, n_splits
        self.rank, self.alpha, self.routing = rank, alpha, routing
        self.average_correction, self.shared_skill = average_correction, shared_skill
        self.require_strength(alpha=alpha, router_lr_mult=router_lr_mult)
        self.router_lr_mult = router_lr_mult
        self.set_task(task)

    def make(self, site: Site, backbone, shared: nn.ModuleDict) -> PolySite:
        return PolySite(site, backbone.ctx, self)

    def lr_mult(self, name: str) -> float:
        return self.router_lr_mult if name.endswith(".logits") else 1.0

    def on_step(self, progress: Progress) -> None:
        if self.routing != "relaxed":
            return
        for piece in self.pieces.values():
            u = torch.rand(piece.noise.shape, generator=progress.generator)
            piece.noise.copy_(u.logit(eps=torch.finfo(u.dtype).eps))

    def finalize(self) -> None:
        for piece in self.pieces.values():
            piece.noise.zero_()

    def set_task(self, task: int | None) -> None:
        """Use this task's mixture for all images, whatever the batch says; None gives each image its own again.

        Raises:
            InputError: no such task.
        """
        if task is not None:
            _check_task(task, self.n_tasks)
        self.task = task
        for piece in self.pieces.values():
            piece.task = task

    @torch.no_grad()
    def to_lora(self, adapted: Adapted, name: str, task: int | None) -> Adapter:
        """Add the mixture of one task to the model as a plain LoRA, not enabled.

        Args:
            adapted: the model that has this adapter.
            name: of the new adapter.
            task: its number; None for the mean of all skills, from which MHR-mu goes on to train.

        Raises:
            InputError: no such task, or the name is taken.
        """
        if task is not None:
            _check_task(task, self.n_tasks)
        arguments = dict(rank=self.rank, alpha=self.alpha, targets=self.targets, layers=self.layers)
        lora = adapted.add(name, ADAPTERS.build({"type": "LoRA", **arguments}), enable=False)
        with evaluating(self):
            for key, piece in self.pieces.items():
                mean = torch.full_like(piece.logits[:1], 1 / self.n_skills)
                a, b = piece.mixed(mean if task is None else piece.weights([task]))
                lora.pieces[key].restore({"a": a[0], "b": b[0]})
        return lora
