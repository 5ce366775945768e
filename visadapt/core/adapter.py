"""The base class of all methods: says where it wants to be and makes one piece per place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..errors import InputError
from ..registry import arguments_of
from .kinds import Side, SiteModule
from .sites import ROLES, Site, select

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from .progress import Progress


class Adapter(nn.Module):
    """One method. Subclasses write `make`; constructor arguments are stored under their own names.

    Args:
        targets: roles, "all-linear", "all-norm", "all-weights" or path globs; the class's own where None.
        layers: block indices, negative from the end; all where None.

    Attributes:
        kinds: kinds of the pieces it makes.
        roles: roles that it can sit at.
        needs: backbone capabilities without which it cannot work.
        paper: the source of the method.
        mergeable: every piece folds into base weights.
        identity_at_init: a fresh adapter changes no output.
        trains_base: it trains base values themselves (`base_parameters`).
        zero_grad: roles at which a gradient is zero by the mathematics, e.g. that of the key bias under softmax, and
            endings of the names of shared parameters.
        calibration: which statistic of `core.calibrate` the start needs, None for a start without data.
        calibration_batches: training batches that the statistic is averaged over.
        n_tasks: tasks that it tells apart by the task numbers of the images.
        task: the one that it is fixed to, None where the images say it.
        started: `has_start` was seen to be true, and need not be asked again.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    targets: tuple[str, ...] = ()
    roles: ClassVar[tuple[str, ...]] = ROLES
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False
    zero_grad: ClassVar[tuple[str, ...]] = ()
    calibration: str | None = None
    calibration_batches: int = 8
    n_tasks: int = 1
    task: int | None = None
    started: bool = False

    def __init__(self, targets: Sequence[str] | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        if isinstance(targets, str):
            raise InputError(f"{type(self).__name__}: targets must be a list, e.g. targets=['{targets}']")
        self.targets = tuple(type(self).targets if targets is None else targets)
        self.layers = None if layers is None else tuple(layers)
        self.pieces = nn.ModuleDict()
        self.common = nn.ModuleDict()

    def make(self, site: Site, backbone: Backbone, shared: nn.ModuleDict) -> SiteModule | None:
        """The piece for one site; None where the method has nothing to do there."""
        raise NotImplementedError

    def shared(self, sites: list[Site], backbone: Backbone) -> nn.ModuleDict:
        """Modules that the pieces share; those of type Side run once per image."""
        return nn.ModuleDict()

    def base_parameters(self, backbone: Backbone) -> list[str]:
        """Names in `backbone.body` that the method trains in place (only with `trains_base`)."""
        return []

    def build(self, backbone: Backbone) -> None:
        """Make all pieces for a backbone.

        Raises:
            InputError: a missing capability, a target that matches nothing, or sites of which none suits the method.
        """
        who = f"{type(self).__name__} on {type(backbone).__name__}"
        if missing := sorted(self.needs - backbone.capabilities):
            raise InputError(f"{who}: it needs {', '.join(missing)}; the backbone has {sorted(backbone.capabilities)}")
        if type(self).targets and not self.targets:
            raise InputError(
                f"{who}: targets is empty; name roles, or leave it out for {', '.join(type(self).targets)}"
            )
        offered = backbone.sites()
        if "tokens" in self.needs:  # it works on the patches of an image, and words are none
            offered = [site for site in offered if site.part != "text"]
        sites = select(offered, self.targets, self.layers, who)
        if wrong := sorted({s.role for s in sites} - set(self.roles)):
            raise InputError(f"{who}: it cannot sit at {', '.join(wrong)}; it takes the roles {', '.join(self.roles)}")
        self.common = self.shared(sites, backbone)
        made = {site.key: self.make(site, backbone, self.common) for site in sites}
        self.pieces = nn.ModuleDict({key: piece for key, piece in made.items() if piece is not None})
        if sites and not self.pieces:
            raise InputError(f"{who}: it has nothing to do at the {len(sites)} chosen sites; choose other targets")

    def weight(self, site: Site, backbone: Backbone) -> Tensor:
        """The frozen weight at a linear or convolution site: a copy in float32, (dim_out, weights per output).

        Raises:
            InputError: a convolution with groups, whose weight is no matrix from inputs to outputs, or a weight that is
                stored as integers.
        """
        module = backbone.body.get_submodule(site.path)
        if getattr(module, "groups", 1) != 1:
            raise InputError(f"{type(self).__name__}: {site.path} has {module.groups} groups; it takes none")
        if not module.weight.is_floating_point():
            raise InputError(
                f"{type(self).__name__}: the weight of {site.path} is stored as {module.weight.dtype}; it needs "
                "floating-point values, so load the backbone without quantisation"
            )
        rows = module.weight.detach()[slice(*(site.rows or (None,)))]
        return rows.float().flatten(1).clone()

    # ---- around training: nothing by default -------------------------------------------------------------------------
    def calibrate(self, statistic: dict[str, Tensor]) -> None:
        """Start from data: `statistic` holds what `core.calibrate` measured, by site key. Once, before training."""

    def has_start(self) -> bool:
        """False while `calibrate` is still to come; training and merging are refused then."""
        return True

    def losses(self) -> dict[str, Tensor]:
        """Regularisers, scalars by name, that are added to the task's loss."""
        return {}

    def queries(self) -> Tensor | None:
        """Object queries (n, d) that it offers to a head that predicts masks; None where it has none."""
        return None

    def lr_mult(self, name: str) -> float:
        """Factor on the learning rate of the parameter `name` of this adapter."""
        return 1.0

    def on_step(self, progress: Progress) -> None:
        """Before the forward pass of an optimizer step: draws of ranks or routes, schedules."""

    def on_gradients(self, progress: Progress) -> None:
        """Between the backward pass and the update: gradients are there and may be changed."""

    def on_update(self, progress: Progress) -> None:
        """After the update: proximal steps, projections, importance from the last gradients."""

    def finalize(self) -> None:
        """After the last step, before the last file is written: pruning, merging of parts."""

    def rest(self) -> Adapter | None:
        """An adapter that is not built yet and has exactly those pieces which are left once its weights are folded in;
        None where the method cannot be without them.
        """
        return None

    def sides(self) -> list[Side]:
        return [m for m in self.common.values() if isinstance(m, Side)]

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this adapter, as JSON values."""
        return arguments_of(self)

    def require_positive(self, **numbers: float) -> None:
        """Refuse counts and widths below 1, by name."""
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{type(self).__name__}: {name} must be a whole number of at least 1, got {value!r}")

    def require_strength(self, **factors: float | None) -> None:
        """Refuse factors that are not above zero and finite, with which nothing is learnt, by name."""
        for name, value in factors.items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{type(self).__name__}: {name} must be above 0 and finite, got {value!r}")

    def require_rate(self, **rates: float) -> None:
        """Refuse probabilities outside [0, 1), by name."""
        for name, value in rates.items():
            if not 0 <= value < 1:
                raise InputError(f"{type(self).__name__}: {name} must be in [0, 1), got {value!r}")
