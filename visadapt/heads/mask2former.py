"""A head that answers with a set of masks, each with a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry import HEADS
from ._mask2former.criterion import set_losses
from ._mask2former.decoder import TransformerDecoder, hidden_places
from ._mask2former.layers import sine_positions
from ._mask2former.pixel_decoder import GROUPS, LEVELS, PixelDecoder


@HEADS.register_module()
class Mask2FormerHead(nn.Module):
    """Mask2Former: queries that look at the image through their own masks, each ending as one class and one mask.

    A pixel decoder with multi-scale deformable attention makes three levels of memory and fine mask features; the
    layers of the transformer decoder visit the levels in turn, coarse to fine; class and mask are read from the queries
    before the first and after each layer. All of it is plain PyTorch. (Cheng et al., 2022, arXiv 2112.01527.)

    Parameters have the names and shapes of mmdet's and mmsegmentation's Mask2FormerHead, so that a checkpoint of theirs
    loads as it is once the prefix "decode_head." is cut off.

    Loss: each class that occurs in an image is one target mask, which one query is matched with; classes cost 2, masks
    5 for the cross entropy and 5 for the dice loss, in the matching as in the loss, and queries without a target
    learn the class "none" with weight 0.1. Masks are compared at random points, most of them where they are uncertain.
    Pixels labelled 255 take no part, unlike in the authors' code, which takes them for background: points there have no
    weight, and points between labelled and ignored pixels the weight of the labelled ones. The class loss leaves out
    images without a labelled pixel.

    Args:
        num_classes: K.
        in_channels: of the four maps, fine to coarse (strides 4, 8, 16 and 32).
        width: of memory, queries and mask features; a multiple of 32 and of `heads`.
        queries: number of queries of its own; without meaning if they are linked.
        heads: of all attention.
        encoder_layers: of the pixel decoder.
        decoder_layers: of the transformer decoder.
        encoder_hidden: inner width of the pixel decoder's feed-forward layers.
        decoder_hidden: that of the transformer decoder.
        points: points per mask at which matching and loss compare masks.
        linked_queries: have no queries of its own but take those of the adapter, as Rein's (Wei et al., 2024, arXiv
            2312.04265): they are the positions, and a linear layer of the head makes the features from them.

    Raises:
        InputError: a size out of range.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        width: int = 256,
        queries: int = 100,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        encoder_hidden: int = 1024,
        decoder_hidden: int = 2048,
        points: int = 12544,
        linked_queries: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_channels, self.width, self.queries = num_classes, list(in_channels), width, queries
        self.heads, self.encoder_layers, self.decoder_layers = heads, encoder_layers, decoder_layers
        self.encoder_hidden, self.decoder_hidden, self.points = encoder_hidden, decoder_hidden, points
        self.linked_queries = linked_queries
        self._check()
        self.pixel_decoder = PixelDecoder(in_channels, width, heads, encoder_hidden, encoder_layers)
        self.transformer_decoder = TransformerDecoder(width, heads, decoder_hidden, decoder_layers)
        if linked_queries:
            self.querys2feat = nn.Linear(width, width)  # Rein's spelling
        else:
            self.query_embed, self.query_feat = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.cls_embed = nn.Linear(width, num_classes + 1)
        inner = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.mask_embed = nn.Sequential(*inner, nn.Linear(width, width))

    def _check(self) -> None:
        sizes = ("num_classes", "queries", "heads", "encoder_layers", "decoder_layers", "encoder_hidden")
        for name in (*sizes, "decoder_hidden", "points", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"Mask2FormerHead: {name} must be 1 or more, got {getattr(self, name)}")
        if len(self.in_channels) != LEVELS + 1:
            raise InputError(
                f"Mask2FormerHead takes {LEVELS + 1} maps, fine to coarse; in_channels has {len(self.in_channels)} "
                "entries: give the backbone four out_indices"
            )
        if self.width % GROUPS or self.width % self.heads:
            raise InputError(
                f"Mask2FormerHead: width must be a multiple of {GROUPS} and of heads={self.heads}, got {self.width}"
            )

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Scores of the classes: over all queries, the sum of P(class) times P(pixel is in the mask).

        Args:
            maps: four (B, in_channels[i], h, w), fine to coarse.
            queries: (n, width) of the adapter, where they are linked.

        Returns:
            (B, K, h, w) at the size of the finest map, float32, 0 or more; they need not sum to 1.

        Raises:
            InputError: queries that are missing or not asked for, or maps that do not fit `in_channels`.
        """
        for logits, masks in self.outputs(maps, queries):  # noqa: B007 (only those of the last layer are kept)
            pass
        with torch.autocast(masks.device.type, enabled=False):  # near ties would be decided by rounding
            shares = logits.float().softmax(-1)[..., :-1]
            return torch.einsum("bqk,bqhw->bkhw", shares, masks.float().sigmoid())

    def loss(self, maps: Sequence[Tensor], masks: Tensor, queries: Tensor | None = None) -> dict[str, Tensor]:
        """Losses, each summed over the outputs of all layers.

        Args:
            maps: as in `forward`.
            masks: (B, H, W) int64 labels of any size, 255 being ignored.
            queries: as in `forward`.

        Returns:
            Scalars "loss_cls", "loss_mask" and "loss_dice", to be added.

        Raises:
            InputError: as in `forward`, a label that is neither a class nor 255, or no labelled pixel in the batch.
        """
        outputs = list(self.outputs(maps, queries))
        with torch.autocast(masks.device.type, enabled=False):
            return set_losses(outputs, masks, self.points)

    def outputs(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, h, w) of the queries as given, then after each layer."""
        found = [m.shape[1] for m in maps]
        if found != self.in_channels:
            raise InputError(f"Mask2FormerHead: in_channels is {self.in_channels}, the maps have {found} channels")
        positions, x = self._queries(queries)
        features, memory, shapes = self.pixel_decoder(maps)
        memory = [cells + which for cells, which in zip(memory, self.level_embed.weight)]
        places = [sine_positions(shape, self.width, features.device) for shape in shapes]
        x = x.repeat(len(features), 1, 1)
        logits, masks = self._read(x, features)
        yield logits, masks
        for i, layer in enumerate(self.transformer_decoder.layers):
            level = i % LEVELS
            x = layer(x, positions, memory[level], places[level], hidden_places(masks, shapes[level]))
            logits, masks = self._read(x, features)
            yield logits, masks

    def _queries(self, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions and features of the queries, (Q, width) each."""
        if not self.linked_queries:
            if given is not None:
                raise InputError(
                    "Mask2FormerHead has queries of its own; set linked_queries=True to take the adapter's"
                )
            return self.query_embed.weight, self.query_feat.weight
        if given is None:
            raise InputError(
                "Mask2FormerHead with linked_queries=True needs an adapter that offers queries, as Rein does with its "
                "query link; without one leave linked_queries out"
            )
        if given.ndim != 2 or given.shape[1] != self.width:
            raise InputError(
                f"Mask2FormerHead takes queries (n, {self.width}), the adapter offers {tuple(given.shape)}; set width"
            )
        return given, self.querys2feat(given)

    def _read(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class and mask logits of queries (B, Q, width)."""
        x = self.transformer_decoder.post_norm(x)
        return self.cls_embed(x), torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), features)
