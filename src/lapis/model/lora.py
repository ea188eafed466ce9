"""LoRA: a frozen model and small trained matrices beside its own (Hu et al. 2021, arXiv:2106.09685).

    wrap(model, LoraConfig(rank=8))        # in place: what was nn.Linear is LoraLinear, all else is frozen
    with off(model): ...                   # the function of the base, for reference log-probabilities

With rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), DoRA (Liu et al. 2024, arXiv:2402.09353), rows of the embedding
that are trained for new tokens, and parts that are trained whole (a classifier's head). Parameters of the base keep
their names and their memory; the adapter's stand beside them as `blocks.0.attn.q.lora_A`. Leaves out: the files
(adapter.py).

Shapes: B batch, T time, I inputs, O outputs, R rank, V vocabulary, D model dim, N rows that are trained.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lapis.config import check_numbers
from lapis.errors import ConfigError
from lapis.families import Part, family_of, part_of
from lapis.families.patterns import covered_parts
from lapis.model.blocks.nf4 import Nf4Linear
from lapis.model.blocks.stacked import LoraStacked, StackedLinear
from lapis.model.heads import LanguageHead
from lapis.model.transformer import Transformer
from lapis.parsing import quoted


@dataclass(frozen=True)
class LoraConfig:
    """What is trained beside a frozen model.

    rank: columns of each adapter. alpha: its strength; what is added is scaled by alpha / rank (default: alpha = 2 *
    rank), with rslora by alpha / sqrt(rank). dropout: of the adapter's input. targets: patterns of components and
    layers (families/patterns.py). dora: magnitude and direction apart. tokens: ids (in a run's settings also texts) of
    tokens whose rows of the embedding, and of an untied head, are trained. whole: patterns of parts that are trained
    in full, by default the head of a classifier, or one that the base lacks. base: what the frozen weights are held in.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn", "mlp")
    rslora: bool = False
    dora: bool = False
    tokens: tuple[int | str, ...] = ()
    whole: tuple[str, ...] | None = None
    base: str = "float32"

    def __post_init__(self) -> None:
        check_numbers(self, "lora")
        if "all-linear" in self.targets:  # PEFT's word
            object.__setattr__(self, "targets", ("attn", "mlp"))
        if self.rank < 1:
            raise ConfigError(f"lora: rank is {self.rank}; it must be 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"lora: alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout is {self.dropout}; it is a share, from 0 to below 1")
        if self.base not in BASES:
            raise ConfigError(f'lora: base is "{self.base}"; it can be {", ".join(BASES)}')
        if len(set(self.tokens)) != len(self.tokens):
            raise ConfigError("lora: tokens names a token twice")
        if not self.targets and not self.tokens:
            raise ConfigError("lora: targets is empty; name parts such as attn or mlp.down")

    @property
    def strength(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """The factor on what an adapter adds; rank, alpha: of a module that has its own."""
        rank, alpha = rank or self.rank, self.strength if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


BASES = ("float32", "bfloat16", "nf4")


@dataclass
class Adapted:
    """What `wrap` did to a model. base: where the frozen weights come from. originals: of what is trained whole."""

    config: LoraConfig
    base: str = ""
    originals: dict[str, Tensor] = field(default_factory=dict)


class LoraLinear(nn.Linear):
    """y = x W^T + b + scale * drop(x) A^T B^T, W and b frozen; with a magnitude (DoRA), rows of W + scale * B A are
    brought to that length, where the length before is taken as constant in the backward pass (section 4.3).

    lora_A [R, I], lora_B [O, R], magnitude [O], all float32. on: False gives the base.
    """

    def __init__(self, base: nn.Linear, a_RI: nn.Parameter, b_OR: nn.Parameter, scale: float, dropout: float = 0.0,
                 magnitude_O: nn.Parameter | None = None) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B, self.magnitude = a_RI, b_OR, magnitude_O
        self.scale, self.dropout, self.on = scale, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return self.plain(x)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        added = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scale
        if self.magnitude is None:
            y = self.plain(x)
            return y + added.to(y.dtype)
        y = self.product(x)
        length_O = (self.magnitude / self.lengths()).to(y.dtype)
        inner = y if dropped is x else self.product(dropped)
        y = y + (length_O - 1) * inner + length_O * added.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, self.weight)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W + scale * B A| of each row, float32 [O], without that matrix: |w|^2 + 2 s w.(ba) + s^2 |ba|^2."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a_RI, b_OR, weight = self.lora_A.float(), self.lora_B.float(), self.weight
            own_O = row_lengths(weight).square()
            cross_O = (b_OR * (weight.float() @ a_RI.T)).sum(1)
            added_O = (b_OR * (b_OR @ (a_RI @ a_RI.T))).sum(1)
            total_O: Tensor = own_O + 2 * self.scale * cross_O + self.scale**2 * added_O
            return total_O.clamp(min=0).sqrt()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32 [O, I]."""
        summed = self.scale * (self.lora_B.float() @ self.lora_A.float())
        if self.magnitude is None:
            return summed
        weight = self.weight.float()
        return (self.magnitude / self.lengths())[:, None] * (weight + summed) - weight


class LoraNf4(LoraLinear):
    """The same over a weight in four bits (QLoRA)."""

    def __init__(self, base: Nf4Linear, a_RI: nn.Parameter, b_OR: nn.Parameter, scale: float, dropout: float = 0.0,
                 magnitude_O: nn.Parameter | None = None) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.bias = base, base.bias
        self.lora_A, self.lora_B, self.magnitude = a_RI, b_OR, magnitude_O
        self.scale, self.dropout, self.on = scale, dropout, True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.base.weight

    def plain(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y

    def product(self, x: Tensor) -> Tensor:
        return self.base.product(x)


def lora_on(base: nn.Linear | Nf4Linear, a_RI: nn.Parameter, b_OR: nn.Parameter, scale: float, dropout: float,
            magnitude_O: nn.Parameter | None) -> LoraLinear:  # fmt: skip
    """An adapter over a linear layer of either kind."""
    if isinstance(base, Nf4Linear):
        return LoraNf4(base, a_RI, b_OR, scale, dropout, magnitude_O)
    return LoraLinear(base, a_RI, b_OR, scale, dropout, magnitude_O)


class TokenRows(nn.Module):
    """The rows of a [V, D] matrix in which trained ones stand in place of some; as a parametrization of it.

    features_NF: What rows have in common and learn together (training/optim/rows.py).
    """

    ids_N: Tensor
    features_NF: Tensor | None

    def __init__(self, ids_N: Tensor, rows_ND: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids_N", ids_N, persistent=False)
        self.register_buffer("features_NF", None, persistent=False)
        self.rows = nn.Parameter(rows_ND)
        self.on = True

    def forward(self, weight_VD: Tensor) -> Tensor:
        return weight_VD.index_copy(0, self.ids_N, self.rows.to(weight_VD.dtype)) if self.on else weight_VD


def of(model: nn.Module) -> Adapted | None:
    """What was wrapped, or None where the model is as it was."""
    adapted: Adapted | None = getattr(model, "adapted", None)
    return adapted


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linear layers by their names here."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def stacked_adapters(model: nn.Module) -> dict[str, LoraStacked]:
    """The same of layers that hold all experts of a block."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraStacked)}


def token_rows(model: Transformer) -> dict[str, TokenRows]:
    """The trained rows, by the parameter that they belong to: "embed.weight", "head.weight"."""
    trained = {}
    for name, module in (("embed.weight", model.embed), ("head.weight", model.head)):
        if parametrize.is_parametrized(module, "weight"):
            rows = module.parametrizations.weight[0]  # type: ignore[union-attr, index]
            assert isinstance(rows, TokenRows)
            trained[name] = rows
    return trained


def whole_parameters(model: Transformer) -> dict[str, Tensor]:
    """The parameters of a model without adapters, by name; a matrix with trained rows is one, these in their places."""
    parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if ".parametrizations." not in n}
    for name in token_rows(model):
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert isinstance(weight, Tensor)
        parameters[name] = weight
    return parameters


def restore_whole(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Puts the values of `whole_parameters` back into the same model. What lies under trained rows stays: the base."""
    state, own = dict(tensors), model.state_dict()
    for name, rows in token_rows(model).items():
        weight, place = state.pop(name), f"{name.rpartition('.')[0]}.parametrizations.weight"
        ids_N, original = rows.ids_N.to(weight.device), own[f"{place}.original"]
        base = weight.index_copy(0, ids_N, original[rows.ids_N].to(weight))
        state |= {f"{place}.original": base, f"{place}.0.rows": weight[ids_N]}
    model.load_state_dict(state)


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: no adapter, no trained row, and the weights before whole training."""
    switches = [module for module in model.modules() if isinstance(module, (LoraLinear, LoraStacked, TokenRows))]
    adapted = of(model)
    originals = adapted.originals if adapted else {}
    trained = {name: model.get_parameter(name).data for name in originals}
    for module in switches:
        module.on = False
    for name, tensor in originals.items():
        model.get_parameter(name).data = tensor
    try:
        yield
    finally:
        for module in switches:
            module.on = True
        for name, tensor in trained.items():
            model.get_parameter(name).data = tensor


def wrap(model: Transformer, config: LoraConfig, base: str = "") -> Transformer:
    """Puts fresh adapters on the targets, in place, and freezes all else; the model's function is what it was.

    A is drawn from torch's generator (uniform, as in PEFT), B is zero.

    Args:
        model: The base.
        config: Rank, targets and the rest.
        base: Where the model comes from, for adapter_config.json.

    Raises:
        ConfigError: For a target that matches nothing (with the nearest names), an id without a row, or what cannot
            be had beside experts in one tensor.
    """
    begin(model, config, base)
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, Nf4Linear) or type(module) in (nn.Linear, StackedLinear)}  # fmt: skip
    parts = {name: part_of(f"{name}.weight") for name in linears}
    picked = covered_parts(config.targets, parts.values(), "lora: targets", family_of(model.config))
    shared: dict[tuple[int | None, str], nn.Parameter] = {}
    for name, linear in linears.items():
        if parts[name] not in picked:
            continue
        if isinstance(linear, StackedLinear):
            place(model, name, _stacked(linear, name, config))
            continue
        group = _group(model, parts[name])
        device = linear.weight.device
        if group not in shared:
            a_RI = torch.empty(config.rank, linear.in_features, device=device)
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
            shared[group] = nn.Parameter(a_RI)
        b_OR = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        magnitude = nn.Parameter(row_lengths(linear.weight)) if config.dora else None
        place(model, name, lora_on(linear, shared[group], b_OR, config.scale(), config.dropout, magnitude))
    ids = [number for number in config.tokens if isinstance(number, int)]
    if len(ids) < len(config.tokens):
        raise ConfigError("lora: tokens must be ids here; texts need a tokenizer, as a run's settings have")
    if ids:
        train_rows(model, ids, row_matrices(model))
    return model


def _stacked(base: StackedLinear, name: str, config: LoraConfig) -> LoraStacked:
    """A fresh adapter beside the layers of all experts, drawn as PEFT draws one matrix of all their A."""
    for setting, value in (("dora", config.dora), ("dropout", config.dropout)):
        if value:
            raise ConfigError(f"lora: {setting} is {quoted(value)}, and {name} holds all experts in one tensor, where "
                              f"PEFT has none; take {setting} out, or name targets without experts")  # fmt: skip
    count, inputs, outputs = base.sizes()
    a_XRI = torch.empty(count * config.rank, inputs, device=base.weight.device)
    nn.init.kaiming_uniform_(a_XRI, a=math.sqrt(5))
    b_XOR = torch.zeros(count, outputs, config.rank, device=base.weight.device)
    a_XRI = a_XRI.view(count, config.rank, inputs)
    return LoraStacked(base, nn.Parameter(a_XRI), nn.Parameter(b_XOR), config.scale())


def begin(model: Transformer, config: LoraConfig, base: str) -> None:
    """Freezes a model but for what is trained whole, and notes that it is adapted."""
    if of(model) is not None:
        raise ConfigError("lora: the model has an adapter already; fuse it first, or go on training it")
    model.requires_grad_(False)
    patterns = config.whole
    if patterns is None:
        patterns = ("head",) if model.fresh or model.config.head in ("classes", "scalar") else ()
    named = {name: part_of(name) for name, _ in model.named_parameters()}
    whole = covered_parts(patterns, named.values(), "lora: whole", family_of(model.config))
    originals = {name: model.get_parameter(name).detach().clone() for name, part in named.items() if part in whole}
    for name in originals:
        model.get_parameter(name).requires_grad_(True)
    model.adapted = Adapted(config, base, originals)


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module where another was."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def row_lengths(weight_OI: Tensor) -> Tensor:
    """The length of each row, float32 [O]."""
    lengths_O: Tensor = torch.linalg.vector_norm(weight_OI.detach(), dim=1, dtype=torch.float32)
    return lengths_O


def row_matrices(model: Transformer) -> list[str]:
    """The matrices with a row for each token: the embedding, and the head where it has its own; none of pictures."""
    if model.config.image is not None:
        return []
    own = isinstance(model.head, LanguageHead) and model.head.weight is not None
    return ["embed.weight", "head.weight"] if own else ["embed.weight"]


def train_rows(model: Transformer, ids: list[int], names: list[str]) -> None:
    """Makes the rows of tokens trainable as they are, in those of `row_matrices` that are named."""
    if model.config.image is not None:
        raise ConfigError(
            f"tokens: {quoted(ids)} are ids of tokens, which a model of pictures has none of; take it out"
        )
    put_rows(model, dict.fromkeys(names, (ids, None)))


def put_rows(model: Transformer, rows: dict[str, tuple[list[int], Tensor | None]]) -> None:
    """Makes rows of "embed.weight" or "head.weight" trainable: ids, and their values (default: as they are)."""
    for name, (ids, values) in rows.items():
        module = model.get_submodule(name.rpartition(".")[0])
        weight = module.weight
        assert isinstance(weight, Tensor)
        wrong = [number for number in ids if not 0 <= number < len(weight)]
        if wrong:
            raise ConfigError(f"tokens: {wrong[0]} has no row; the model has {len(weight):,}, add tokens first")
        index = torch.tensor(ids, device=weight.device)
        taken = weight.detach()[index].clone() if values is None else values.to(weight.device)
        parametrize.register_parametrization(module, "weight", TokenRows(index, taken.float()), unsafe=True)


def _group(model: Transformer, part: Part) -> tuple[int | None, str]:
    """Modules that one adapter on disk covers share its A: q, k and v of a family whose folders hold them fused."""
    rule, _ = family_of(model.config).rule_for(
        f"blocks.{part.layer}.{part.component}.weight" if part.layer is not None else f"{part.component}.weight"
    )
    return part.layer, rule.component
