"""A causal model of transformers behind the face of our own: for what only reads it, and never to train or save it.

transformers opens no file here: config.json is cleaned of all that could name code, tensors are read, checked for NaN
and handed over, and nothing is fetched. Its model is proved once, on a handful of tokens: that no token sees a later
one, and that the head is the linear map (with the factor or soft cap that its config names) which a lens needs.

Shapes: B batch, T time, S time of all tokens, D model dim, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError, ConfigError, LapisError, MissingExtra
from lapis.families import known_types
from lapis.families.config import Head, Image
from lapis.families.fields import LARGEST, MOST_LAYERS
from lapis.model.check import FLOATS, SMALL, dtype_of
from lapis.model.load import read_tensors
from lapis.model.reading.readable import ReadableModel

CODE = ("auto_map", "attn_implementation", "experts_implementation", "custom_pipelines")  # never handed on
CONTEXTS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
UNNAMED_CONTEXT = 2048
CACHES = ("past_key_values", "cache")  # what a forward calls it
PROBE = 6  # tokens that a model is proved on


@dataclass(frozen=True)
class OutsideConfig:
    """The shape of a model of transformers, as far as its config.json says it."""

    family: str
    dim: int
    layers: int
    heads: int
    vocab: int
    context: int
    named: bool = True
    """Whether config.json names the context."""
    causal: bool = True
    head: Head = "lm"
    image: Image | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def reach(self) -> int:
        """Tokens that prompt and reply may have together."""
        return self.context


class OutsideHead(nn.Module):
    """logits = cap tanh(scale (hidden matrix^T + bias) / cap), as the config says; without a cap the inner part."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        linear, config = inner.get_output_embeddings(), inner.config.get_text_config()
        self._linear = (linear,)  # in a tuple: not a second home for its parameters
        self.cap = _number(config, "final_logit_softcapping")
        factor, divisor = _number(config, "logit_scale"), _number(config, "logits_scaling")
        self.scale = (factor or 1.0) * (_number(config, "lm_head_multiplier") or 1.0) / (divisor or 1.0)

    @property
    def matrix(self) -> Tensor:
        """The output embedding, [V, D]."""
        matrix: Tensor = self._linear[0].weight
        return matrix

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        bias: Tensor | None = getattr(self._linear[0], "bias", None)
        return bias

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.matrix, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class OutsideCache:
    """transformers' own cache of keys and values; where a model has none that can be handed on, the tokens themselves,
    which each step then reads anew."""

    def __init__(self, past: Any, batch: int, device: torch.device) -> None:
        self.past = past
        self.ids_BS = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.mask_BS = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    @property
    def length(self) -> int:
        return self.ids_BS.shape[1]

    def append(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        """Takes in new tokens, before they are read."""
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        self.ids_BS = torch.cat((self.ids_BS, ids_BT), 1)
        self.mask_BS = torch.cat((self.mask_BS, real_BT), 1)

    def select(self, rows: Tensor) -> None:
        self.ids_BS, self.mask_BS = self.ids_BS[rows], self.mask_BS[rows]
        if self.past is not None:
            self.past.batch_select_indices(rows)

    def truncate(self, length: int) -> None:
        if length != self.length and self.past is not None:
            raise ValueError("this cache cannot be cut; start with a new one")
        self.ids_BS, self.mask_BS = self.ids_BS[:, :length], self.mask_BS[:, :length]


class OutsideModel(ReadableModel):
    """A model of transformers; `inner` is it, whole: also any part that hooks look for.

    Args:
        inner: A causal language model, in evaluating mode.
        config: Its shape.
    """

    config: OutsideConfig

    def __init__(self, inner: Any, config: OutsideConfig) -> None:
        super().__init__()
        self.inner, self.config, self.notes, self.generation = inner, config, [], {}
        self._trunk = (inner.base_model,)
        takes = inspect.signature(inner.base_model.forward).parameters
        self._positions = "position_ids" in takes
        stateful = bool(getattr(inner, "_is_stateful", False))
        self._cache_name = None if stateful else next((name for name in CACHES if name in takes), None)
        self._padded = not stateful and "attention_mask" in takes
        linear = inner.get_output_embeddings()
        self.head = OutsideHead(inner) if isinstance(getattr(linear, "weight", None), Tensor) else nn.Identity()

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        logits_BTV: Tensor = self.head(self.hidden(ids_BT, mask_BT))
        return logits_BTV

    def hidden(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads: the last hidden state, or, where the head is not known, the logits themselves."""
        if segments_BT is not None or types_BT is not None or positions_BT is not None:
            raise ConfigError(f"a {self.config.family} model, which runs through transformers, takes no packed rows")
        if cache is None:
            return self._run(ids_BT, mask_BT, None)
        cache.append(ids_BT, mask_BT)
        if cache.past is None:
            return self._run(cache.ids_BS, cache.mask_BS, None)[:, -ids_BT.shape[1] :]
        return self._run(ids_BT, cache.mask_BS, cache.past)

    def new_cache(self, batch: int, room: int) -> OutsideCache:
        """An empty cache for `batch` rows.

        Args:
            batch: Rows.
            room: Is not needed: it grows.
        """
        from transformers import DynamicCache

        past = None if self._cache_name is None else DynamicCache(config=self.inner.config)
        return OutsideCache(past, batch, self.device)

    def _run(self, ids_BT: Tensor, mask_BS: Tensor | None, past: Any) -> Tensor:
        hides = mask_BS is not None and not bool(mask_BS.all())
        if hides and not self._padded:
            return self._row_by_row(ids_BT, mask_BS)
        options: dict[str, Any] = {"use_cache": past is not None}
        if mask_BS is not None and hides:
            options["attention_mask"] = mask_BS.long()
            if self._positions:
                options["position_ids"] = (mask_BS.long().cumsum(1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        if past is not None and self._cache_name is not None:
            options[self._cache_name] = past
        if isinstance(self.head, OutsideHead):
            hidden_BTD: Tensor = self._trunk[0](input_ids=ids_BT, **options)[0]
            return hidden_BTD
        logits_BTV: Tensor = self.inner(input_ids=ids_BT, **options).logits
        return logits_BTV

    def _row_by_row(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """For a model that cannot pass over padding: each row by itself; what stands at padding is 0."""
        assert mask_BT is not None
        rows = [self._run(ids_T[None, real_T], None, None)[0] for ids_T, real_T in zip(ids_BT, mask_BT, strict=True)]
        out_BTD = rows[0].new_zeros(*ids_BT.shape, rows[0].shape[-1])
        out_BTD[mask_BT] = torch.cat(rows)
        return out_BTD

    @torch.inference_mode()
    def prove(self) -> None:
        """Looks at the logits of a few tokens: their number, that none sees a later one, and what the head is.

        Raises:
            ConfigError: A token sees later ones.
        """
        ids_BT = torch.linspace(0, self.config.vocab - 1, PROBE, device=self.device).long()[None].repeat(2, 1)
        ids_BT[1, -1] = ids_BT[1, 1]
        own_BTV = self.inner(input_ids=ids_BT, use_cache=False).logits
        allowed = max(torch.finfo(own_BTV.dtype).eps * 8, 2e-5) * max(1.0, float(own_BTV.abs().max()))
        if not float((own_BTV[0, :-1] - own_BTV[1, :-1]).abs().max()) <= allowed:
            raise ConfigError(
                f"a {self.config.family} model with this config.json sees later tokens; give a causal one"
            )
        self.config = replace(self.config, vocab=own_BTV.shape[-1])
        try:
            proved = float((self.head(self.hidden(ids_BT)) - own_BTV).abs().max()) <= allowed
        except (RuntimeError, TypeError):  # states that the head does not take as they are
            proved = False
        if not proved:
            self.head = nn.Identity()


def read_outline(checkpoint: Checkpoint) -> OutsideConfig:
    """The shape of a folder's model, before a weight is read.

    Args:
        checkpoint: Of a family that lapis does not run.

    Raises:
        MissingExtra: transformers is not installed.
        CheckpointError: transformers does not know the model_type either, or refuses the config; the weights are
            quantized; the folder is an adapter on such a model.
    """
    config, _ = _classes(checkpoint)
    text = config.get_text_config(decoder=True)
    sizes = {"hidden_size": LARGEST, "num_hidden_layers": MOST_LAYERS, "vocab_size": LARGEST}
    for name, most in sizes.items():
        value = getattr(text, name, None)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(f"{checkpoint.source}: config.json: {name} is {value!r:.40}; expected 1 to {most:,}")
    named = [value for name in CONTEXTS if isinstance(value := getattr(text, name, None), int) and value > 0]
    return OutsideConfig(
        family=str(checkpoint.config["model_type"]), dim=text.hidden_size, layers=text.num_hidden_layers,
        heads=int(getattr(text, "num_attention_heads", None) or 0), vocab=text.vocab_size,
        context=named[0] if named else UNNAMED_CONTEXT, named=bool(named),
    )  # fmt: skip


def load_outside(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> OutsideModel:
    """The model of a folder, run by transformers.

    Args:
        checkpoint: Of a family that lapis does not run.
        dtype: Of the weights in memory; by default that of most of the folder's.
        device: Where the weights go.

    Raises:
        CheckpointError: As `read_outline`, and for tensors that are missing, of a wrong shape, or no numbers.
        ConfigError: The model looks at later tokens.
    """
    outline = read_outline(checkpoint)
    config, model_class = _classes(checkpoint)
    checkpoint = checkpoint.fetched()
    with torch.device("meta"), quiet():
        described = sum(parameter.numel() for parameter in _tried(checkpoint, model_class, config).parameters())
    held = sum(info.elements for info in checkpoint.index.values())
    if described > held:
        raise CheckpointError(
            f"{checkpoint.source}: config.json describes {described:,} parameters, the files hold {held:,}; fetch both"
        )
    floats = [name for name in checkpoint.names if checkpoint.index[name].dtype in FLOATS]
    dtype = dtype or getattr(torch, dtype_of(checkpoint, floats))
    tensors = dict(read_tensors(checkpoint, checkpoint.names, dtype))
    with quiet():
        inner, report = _tried(
            checkpoint, model_class.from_pretrained, None, config=config, state_dict=tensors, dtype=dtype,
            output_loading_info=True, trust_remote_code=False, local_files_only=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        listed = ", ".join(map(str, missing[:4])) + (" ..." if len(missing) > 4 else "")
        raise CheckpointError(f"{checkpoint.source}: {len(missing)} tensors are missing: {listed}; fetch it again")
    model = OutsideModel(inner.to(device).eval(), outline)
    _tried(checkpoint, model.prove)
    generation = checkpoint.json("generation_config.json")
    model.generation = dict(generation) if isinstance(generation, Mapping) else {}
    model.notes = [*checkpoint.notes, *_notes(model, report)]
    return model


def _notes(model: OutsideModel, report: Mapping[str, Any]) -> Iterator[str]:
    import transformers

    config = model.config
    yield f"{config.family} runs through transformers {transformers.__version__}; lapis neither trains nor serves it"
    if not config.named:
        yield f"config.json names no context; {config.context:,} tokens are taken"
    if model._cache_name is None:
        yield "it keeps a state that cannot be handed on here: each new token reads the whole text again"
    if unused := report["unexpected_keys"]:
        yield f"{len(unused)} tensors have no place in it: {', '.join(sorted(map(str, unused))[:3])}"


def _classes(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The config and the class of a causal model of transformers."""
    kind = checkpoint.config.get("model_type")
    try:
        import transformers
    except ImportError:
        raise MissingExtra(
            f"{checkpoint.source}: a model of the type {kind!s:.40} runs through transformers, which", "hf"
        ) from None
    if checkpoint.adapter is not None:
        raise CheckpointError(
            f"{checkpoint.source}: holds an adapter on a model that runs through transformers; make it a model with: "
            f"lapis fuse {checkpoint.source} --out DIR"
        )
    if "quantization_config" in checkpoint.config or any(i.dtype in SMALL for i in checkpoint.index.values()):
        raise CheckpointError(f"{checkpoint.source}: its weights are quantized; give a folder of 16-bit weights")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{checkpoint.source}: config.json: model_type is {kind!s:.40}; lapis builds {known_types()}, and "
            f"transformers {transformers.__version__} does not know it either"
        )
    with quiet():
        config = _tried(checkpoint, transformers.CONFIG_MAPPING[kind].from_dict, _cleaned(checkpoint.config))
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal or getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{checkpoint.source}: a {kind} says no next token; give a causal language model")
    return config, causal[type(config)]


def _cleaned(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what names code, or where to get it from, at any depth."""
    return {
        name: _cleaned(value) if isinstance(value, Mapping) else value
        for name, value in fields.items() if not name.startswith("_") and name not in CODE
    }  # fmt: skip


def _tried(checkpoint: Checkpoint, call: Any, *given: Any, **options: Any) -> Any:
    """What a call into transformers gives; whatever it raises at a file's fault is one line."""
    try:
        return call(*given, **options)
    except LapisError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{checkpoint.source}: transformers cannot run it: {reason:.300}") from None


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value else None


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and reports of transformers: what matters of them is said in our notes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
