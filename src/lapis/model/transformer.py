"""The one transformer: embed, blocks, final norm, head. Families differ in its settings, and some in their block.

The model knows one device and keeps no state between calls: a cache is an argument. Sharding and checkpointing are
applied from outside (training/distributed/).

Shapes: B batch, T time, S time of keys, D model dim, V vocabulary, C classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.errors import DataError
from lapis.families.config import CLASS_FIELDS, Head, ModelConfig, class_fields
from lapis.model.blocks import architecture_of
from lapis.model.blocks.attention import LentKeys, Shared, View, additive
from lapis.model.blocks.norm import compute_dtype
from lapis.model.blocks.rope import query_gain, rope_tables
from lapis.model.blocks.standard import Norms, TransformerBlock
from lapis.model.cache import Cache
from lapis.model.heads import make_head
from lapis.model.reading.readable import ReadableModel

INIT_STD = 0.02
NOTHING_HIDDEN = View(None, False)


class Embed(nn.Module):
    """Tokens (or picture patches) as vectors, with learned positions and token types where the family has them.

    layers: What gives each layer a vector of each token, where there is such; `Transformer.start` calls it.
    """

    def __init__(self, config: ModelConfig, scale: float = 1.0, layers: nn.Module | None = None) -> None:
        super().__init__()
        image, self.scale = config.image, scale
        if image is None:
            self.weight = nn.Parameter(torch.empty(config.vocab, config.dim))
        else:
            self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
            self.patch = nn.Conv2d(image.channels, config.dim, image.patch, stride=image.patch)
        self.first = config.first_position
        rows = self.first + config.context if image is None else image.patches + 1
        self.position = nn.Embedding(rows, config.dim) if config.positions == "learned" else None
        self.types = nn.Embedding(config.types, config.dim) if config.types else None
        self.layers = layers

    def forward(self, ids_BT: Tensor, positions: Tensor, types_BT: Tensor | None) -> Tensor:
        x_BTD = F.embedding(ids_BT, self.weight)
        if self.scale != 1.0:
            x_BTD = x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype, device=x_BTD.device)
        if self.types is not None:
            x_BTD = x_BTD + (self.types.weight[0] if types_BT is None else self.types(types_BT))
        return x_BTD if self.position is None else x_BTD + self.position(positions + self.first)

    def pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, channels, size, size] -> [B, 1 + patches, D], the class token first (Dosovitskiy et al. 2020)."""
        patches_BTD = self.patch(pixels_BCHW).flatten(2).transpose(1, 2)
        x_BTD = torch.cat((self.cls.to(patches_BTD.dtype).expand(len(patches_BTD), -1, -1), patches_BTD), 1)
        return x_BTD if self.position is None else x_BTD + self.position.weight


class Transformer(ReadableModel):
    """`model(ids_BT, mask_BT)` -> logits_BTV (or scores_BC of a classifier, or hidden_BTD where there is no head).

    hidden = model.hidden(ids_BT, ...), logits = model.head(hidden): in two steps, where a loss wants the head on some
    tokens only. notes: what loading had to say. Made with random weights (normal, 0.02; what writes to the residual
    stream by 1/sqrt(2 layers) less, as in GPT-2); under `torch.device("meta")` nothing is allocated.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.notes: list[str] = []
        self.stem = ""  # of its modules' names in the folder, where that is a multimodal one
        self.adapted: Any = None  # what lora.wrap did to it
        self.fresh: tuple[str, ...] = ()  # parameters that the folder lacked
        self.generation: dict[str, Any] = {}  # generation_config.json of the folder
        self.dropout = 0.0
        architecture = architecture_of(config)
        make_inputs = architecture.layer_inputs if config.layer_inputs is not None else None
        self.embed = Embed(config, architecture.embed_scale(config), make_inputs and make_inputs(config))
        self.blocks = nn.ModuleList(architecture.block(config, layer) for layer in range(config.layers))
        places = {"pre": ("final",), "post": ("embed",), "embed": ("embed", "final")}[config.norm_place]
        self.norm = Norms(config, architecture.norm, *places)
        self.head = make_head(config, self.embed)
        self.reset_parameters()

    def drop(self, share: float) -> None:
        """While training, leaves out a share of what the embedding and each half of a block add to the stream.

        (Srivastava et al. 2014; BERT's hidden_dropout_prob.) A setting of training, so no folder remembers it.

        Args:
            share: From 0 to below 1.
        """
        self.dropout = share
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                module.dropout = share

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew from torch's generator."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue  # nothing to draw; and torch would import its compiler for it, which takes a second
            module, _, last = name.rpartition(".")
            if name.endswith("bias"):
                parameter.zero_()
            elif last in (starts := getattr(self.get_submodule(module), "starts", {})):
                parameter.fill_(starts[last])
            else:
                parameter.normal_(0.0, residual_std if name.endswith(("attn.o.weight", ".down.weight")) else INIT_STD)

    def forward(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """The logits of a language model, or those of a classifier.

        Args:
            ids_BT: int64 token ids; float pixels [B, C, H, W] for pictures.
            mask_BT: bool, True = a real token.
            positions_BT: int64; where not given they count the real tokens of each row (or segment).
            segments_BT: int64; a token attends only within its segment.
            types_BT: int64, BERT's token types.
            cache: These tokens follow those in it.

        Returns:
            [B, T, V], or [B, classes] from a classifier's head.

        Raises:
            DataError: For more tokens than a model with learned positions has.
        """
        hidden_BTD = self.hidden(ids_BT, mask_BT, positions_BT=positions_BT, segments_BT=segments_BT,
                                 types_BT=types_BT, cache=cache)  # fmt: skip
        if self.config.head in ("classes", "scalar"):
            hidden_BTD = self.summary(hidden_BTD, mask_BT)
        logits: Tensor = self.head(hidden_BTD)
        return logits

    def hidden(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """The last hidden state, [B, T, D], after the final norm; the arguments are `forward`'s."""
        x_BTD, shared = self.start(
            ids_BT, mask_BT, positions_BT=positions_BT, segments_BT=segments_BT, types_BT=types_BT, cache=cache
        )
        for block in self.blocks:
            x_BTD = block(x_BTD, shared, cache)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        return self.end(x_BTD)

    def new_cache(self, batch: int, room: int) -> Cache:
        """An empty cache for `batch` rows, which begins with room for `room` tokens of each.

        Args:
            batch: Rows.
            room: Tokens; it grows by itself.
        """
        weight = self.embed.weight
        return Cache(self.config, batch, room, dtype=compute_dtype(weight), device=weight.device)

    def start(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Cache | None = None,
    ) -> tuple[Tensor, Shared]:  # fmt: skip
        """What enters the first block, [B, T, D], and what all blocks are given; the arguments are `forward`'s."""
        if self.config.image is not None:
            x_BTD = self.embed.pixels(ids_BT)
            shared = Shared(NOTHING_HIDDEN, NOTHING_HIDDEN)
        else:
            positions, shared = self._prepare(ids_BT, mask_BT, positions_BT, segments_BT, cache)
            x_BTD = self.embed(ids_BT, positions, types_BT)
            if self.embed.layers is not None:
                shared = shared._replace(inputs_BTLP=self.embed.layers(ids_BT, x_BTD))
        if self.config.norm_place != "pre":
            x_BTD = self.norm.embed(x_BTD)
        return (F.dropout(x_BTD, self.dropout) if self.dropout and self.training else x_BTD), shared

    def end(self, x_BTD: Tensor) -> Tensor:
        """The last hidden state from what left the last block."""
        return x_BTD if self.config.norm_place == "post" else self.norm.final(x_BTD)

    def summary(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What a classifier looks at, [B, D]: the last real token where causal, else the first; or the mean of all.

        Args:
            hidden_BTD: After the final norm.
            mask_BT: bool, True = a real token.
        """
        if self.config.pooling == "mean":
            mask_BT = torch.ones_like(hidden_BTD[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT
            return (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
        if mask_BT is None:
            return hidden_BTD[:, -1 if self.config.causal else 0]
        places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        chosen_B = torch.where(mask_BT, places, 0).amax(1) if self.config.causal else mask_BT.int().argmax(1)
        return hidden_BTD[torch.arange(len(chosen_B), device=chosen_B.device), chosen_B]

    def _prepare(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        segments_BT: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Shared]:
        """Positions, rotary tables and masks, once for all layers."""
        config = self.config
        T, past = ids_BT.shape[1], 0 if cache is None else cache.length
        if segments_BT is not None and cache is not None:
            raise ValueError("segments and a cache do not go together: a cached sequence is one document")
        real_BT = mask_BT if mask_BT is not None or segments_BT is None else segments_BT != 0
        if mask_BT is not None and (cache is None or past == 0) and is_whole(mask_BT, config.causal and cache is None):
            mask_BT = None
        positions = positions_BT if positions_BT is not None else count_positions(ids_BT, mask_BT, segments_BT, cache)
        if config.positions == "learned" and past + T > config.context and int(positions.max()) >= config.context:
            raise DataError(f"{past + T} tokens; the model has {config.context} learned positions, cut the text")
        if cache is not None and (cache.positions_BS is not None or positions.dim() == 2):
            cache.remember(positions.expand(cache.batch, T), mask_BT)
        dtype = compute_dtype(self.embed.weight)
        full = make_view(T, past, config.causal, None, mask_BT, positions, segments_BT, cache, dtype)
        near = full
        if config.window is not None and past + T > config.window:
            near = make_view(T, past, config.causal, config.window, mask_BT, positions, segments_BT, cache, dtype)
        if config.positions != "rotary":
            return positions, Shared(full, near, real_BT=real_BT, segments_BT=segments_BT)
        length = int(positions.max()) + 1 if config.rope.kind == "dynamic" else past + T
        wide = config if config.uneven is None else dataclasses.replace(config, head_dim=config.uneven.head_dim)
        rotation = near_rotation = rope_tables(config.rope, wide, positions, dtype, length)
        if config.window_rope is not None:
            near_rotation = rope_tables(config.window_rope, config, positions, dtype, length)
        gain = query_gain(config, positions, dtype)
        lent = LentKeys() if config.uneven is not None and config.uneven.borrowing else None
        return positions, Shared(full, near, rotation, near_rotation, gain, real_BT, segments_BT, lent)


def is_whole(mask_BT: Tensor, causal: bool) -> bool:
    """Whether the mask hides nothing that would be seen: all real, or (causal) padding on the right only.

    Looks at the values only where that is cheap, which is on the CPU and outside of a compiled graph.

    Args:
        mask_BT: bool, True = a real token.
        causal: Whether later tokens are hidden anyway.
    """
    if mask_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if causal:
        return bool((mask_BT[:, 1:] <= mask_BT[:, :-1]).all())
    return bool(mask_BT.all())


def count_positions(ids_BT: Tensor, mask_BT: Tensor | None, segments_BT: Tensor | None, cache: Cache | None) -> Tensor:
    """Positions [T], or [B, T] where rows differ: the number of real tokens before, in the row or in the segment."""
    T = ids_BT.shape[1]
    past = 0 if cache is None else cache.length
    places = torch.arange(past, past + T, device=ids_BT.device)
    if segments_BT is not None:
        begins = torch.ones_like(segments_BT, dtype=torch.bool)
        begins[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        return places - torch.where(begins, places, 0).cummax(1).values
    before = 0 if cache is None or cache.real_BS is None else cache.real_BS.sum(1, keepdim=True)
    if mask_BT is not None:
        before = past if isinstance(before, int) else before
        return (before + mask_BT.long().cumsum(1) - 1).clamp_(min=0)
    if isinstance(before, int):
        return places
    return before + torch.arange(T, device=ids_BT.device)


def make_view(
    T: int,
    past: int,
    causal: bool,
    window: int | None,
    mask_BT: Tensor | None,
    positions: Tensor,
    segments_BT: Tensor | None,
    cache: Cache | None,
    dtype: torch.dtype,
) -> View:
    """Who sees whom: the causal order by place, the window by position, padding and other segments not at all.

    A layer with a window finds in the cache only the keys that are in sight, then the new ones.

    Args:
        T: New tokens.
        past: Tokens in the cache.
        causal: Whether later tokens are hidden.
        window: Of positions that a token sees, back and (not causal) ahead; None = all.
        mask_BT: bool, True = a real token, of all tokens.
        positions: int64 [T] or [B, T].
        segments_BT: int64; a token attends only within its segment.
        cache: What holds the earlier keys.
        dtype: Of the scores.
    """
    key_mask = mask_BT if cache is None else cache.real_BS
    S = past + T if window is None or cache is None else cache.in_sight + T
    if key_mask is None and segments_BT is None:
        if (not causal or T == 1) and (window is None or window >= S):
            return NOTHING_HIDDEN
        if causal and past == 0 and (window is None or window >= T):
            return View(None, True)
    device = positions.device
    places = torch.arange(past, past + T, device=device)
    keys = torch.arange(past + T - S, past + T, device=device)
    seen = torch.ones(1, 1, 1, S, dtype=torch.bool, device=device)
    if causal:
        seen = (keys <= places[:, None])[None, None]
    if window is not None:
        if cache is not None and cache.positions_BS is not None:
            key_positions = cache.positions_BS[:, -S:]
        else:
            key_positions = keys if cache is not None else positions
        apart = positions[..., :, None] - key_positions[..., None, :]
        near = (apart if causal else apart.abs()) < window
        seen = seen & (near[None, None] if near.dim() == 2 else near[:, None])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, -S:]
    if segments_BT is not None:
        seen = seen & (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return View(additive(seen, dtype), False)


def put_head(model: Transformer, head: Head, classes: Sequence[str] = ()) -> list[str]:
    """Puts another head on a model, in place. A head that is the same already keeps its weights.

    Args:
        model: Whose head is replaced. What the old one has of the same name and shape (a pooler, one's own embedding
            rows) is kept.
        head: The kind of the new one.
        classes: Their names in order, for head="classes"; config.json gets them, where transformers looks for them.

    Returns:
        The names of the parameters that are new and drawn at random (standard deviation 0.02).
    """
    if (head == "classes") != bool(classes):
        raise ValueError("classes are given with the head of that name, and only with it")
    config, old = model.config, model.head.state_dict()
    extra = {name: value for name, value in config.extra.items() if name not in CLASS_FIELDS} | class_fields(classes)
    pooler = head in ("classes", "scalar") and config.pools
    like = next(model.parameters())
    model.config = dataclasses.replace(config, head=head, classes=len(classes), pooler=pooler, extra=extra)
    model.head = make_head(model.config, model.embed).to(like.device, like.dtype)
    fresh = []
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name in old and old[name].shape == parameter.shape:
                parameter.copy_(old[name])
                continue
            fresh.append(f"head.{name}")
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    model.head.train(model.training)
    return fresh
