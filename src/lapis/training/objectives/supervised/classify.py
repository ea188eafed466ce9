"""Classes of texts or pictures: cross entropy on the class head, for encoders, causal models and vision transformers.

Texts of a batch share its rows, so that little of it is padding. The names of the classes go into config.json
(`id2label`), where other tools look for them. What is random (token masks, shifts) depends on seed, epoch and example
only, so a run that was stopped goes on exactly. Leaves out: several labels for one text, weights for classes.

Shapes: B examples, C classes, T tokens, H height, W width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import ConfigError
from lapis.evaluation.classification import class_scores, figures, fits, loss_of, predict
from lapis.families.config import class_fields
from lapis.model.transformer import Transformer
from lapis.text.corpus.labels import Labeled, classes_of, labeled, numbers_of
from lapis.text.corpus.pictures import Pictures, pictures
from lapis.text.rows.sequences import Together, encode_framed, together
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.objective import Cursor, DataPlace, Loss, Objective, in_order, random_of
from lapis.wording import format_count

_DESCRIBED = ("dropout", "smoothing", "hide", "shift", "positive", "resize", "mean", "std")


@dataclass(frozen=True)
class Batch:
    """inputs: texts side by side, or pictures [B, C, H, W]. labels_B: int64."""

    inputs: Together | Tensor
    labels_B: Tensor


@dataclass(eq=False, kw_only=True)
class Classify(Objective):
    """Which class a text or a picture belongs to.

    Args:
        data: Labeled texts (.tsv, .csv, .jsonl; text/corpus/labels.py), or with no tokenizer pictures (.npz or a folder
            with one folder per class; text/corpus/pictures.py).
        context: Tokens of a text. The rest is cut and counted.
        valid: Held-out data of the same kind: accuracy, F1 and the confusion matrix are measured on it.
        classes: Their names in order; by default those that occur, sorted.
        positive: The class that `f1` is of where there are two; by default the second.
        dropout: See Transformer.drop.
        smoothing: Share of the target that goes to all classes alike.
        hide: Share of the tokens that are hidden while training: replaced by the mask token, or left out where the
            tokenizer has none.
        shift: Pixels by which a picture is moved at random.
        resize: Side that the pictures of a folder are brought to.
        mean: What bytes (as 0 to 1) are shifted by, per channel; by default 0.5, as ViT has it.
        std: What they are then divided by; by default 0.5.
    """

    valid: Any = None
    classes: list[str] | None = None
    positive: str | None = None
    dropout: float = 0.0
    smoothing: float = 0.0
    hide: float = 0.0
    shift: int = 0
    resize: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    name = "classify"
    head = "classes"
    needs_tokenizer = False

    def __post_init__(self) -> None:
        for name, share in (("dropout", self.dropout), ("smoothing", self.smoothing), ("hide", self.hide)):
            if not 0 <= share < 1:
                raise ConfigError(f"classify: {name} is {share}; it is a share, from 0 to below 1")
        self.examples = self._read(self.data)
        names = self.classes = self.classes or classes_of(self.examples.labels)
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"classify: the classes are {', '.join(names)}; two or more different ones are needed")
        figures([], [], names, self.positive)  # refuses a positive that is no class
        self.examples.number(names)
        self.held_out = None if self.valid is None else self._read(self.valid)
        if self.held_out is not None:
            self.held_out.number(names)
        self.rows = len(self.examples.labels)
        self._report: dict[str, Any] = {}

    @property
    def class_names(self) -> list[str]:
        return self.classes or []

    def _read(self, data: Any) -> "_Examples":
        scaling = (self.resize, tuple(self.mean or [0.5]), tuple(self.std or [0.5]))
        return _Examples(self.tokenizer, data, self.context, scaling)

    @property
    def tokens_per_row(self) -> float:
        return self.examples.counts.get("tokens", 256 * self.rows) / self.rows  # a picture has some 256 patches

    def describe(self) -> dict[str, Any]:
        counts = {"examples": self.rows, "classes": len(self.class_names), **self.examples.counts}
        if self.held_out is not None:
            counts["held_out"] = len(self.held_out.labels)
        return {
            "objective": "classify",
            "data": self.examples.digest,
            "valid": {} if self.held_out is None else {"": self.held_out.digest},
            "classes": self.class_names,
            "counts": counts,
            "context": self.context,
            "options": {name: getattr(self, name) for name in _DESCRIBED},
            "tokenizer": self.tokenizer.digest() if self.tokenizer else None,
        }

    def batches(self, state: DataPlace) -> Iterator[tuple[Batch, Cursor]]:
        for chosen, places, cursor in in_order(self.rows, state.rows, state.cursor, state.seed):
            taken = self.examples.take(chosen)
            if isinstance(taken, Tensor):
                inputs: Together | Tensor = self._shifted(taken, cursor["seed"], places)
            else:
                inputs = together(self._hidden(taken, cursor["seed"], places), self._pad)
            yield Batch(inputs, torch.tensor([self.examples.numbers[i] for i in chosen])), cursor

    def prepare(self, model: Transformer, batch: Batch) -> Batch:
        self._check(model)
        device = next(model.parameters()).device
        return Batch(batch.inputs.to(device), batch.labels_B.to(device))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        logits_BC = class_scores(model, batch.inputs).float()
        loss = F.cross_entropy(logits_BC, batch.labels_B, reduction="sum", label_smoothing=self.smoothing)
        right = int((logits_BC.argmax(1) == batch.labels_B).sum())
        places = batch.inputs[:, 0].numel() if isinstance(batch.inputs, Tensor) else batch.inputs.ids_RT.numel()
        return loss, len(batch.labels_B), {"tokens": places, "accuracy": right}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """accuracy, f1_macro, f1 (of the positive of two classes) and valid_loss; nothing where none is held out."""
        if self.held_out is None:
            return {}
        self._check(model)
        logits = predict(model, self.held_out.inputs, progress=self.heard)
        scores = figures(self.held_out.numbers, logits.argmax(1).tolist(), self.class_names, self.positive)
        self._report = {**scores, "loss": loss_of(logits, self.held_out.numbers)}
        shown = {name: scores[name] for name in ("accuracy", "f1_macro", "f1") if scores[name] is not None}
        return {**shown, "valid_loss": self._report["loss"]}

    def sample(self, model: Transformer) -> str:
        """The class of the first example."""
        examples = self.held_out or self.examples
        first = examples.inputs[:1] if isinstance(examples.inputs, list) else None
        if first is None or self.tokenizer is None:
            return ""
        chances = torch.from_numpy(predict(model, first))[0].softmax(0)
        best = int(chances.argmax())
        text = " ".join(self.tokenizer.decode(first[0], True).split())
        return f"{text[:60]} -> {self.class_names[best]} ({float(chances[best]):.2f}; it is {examples.labels[0]})"

    def write(self, folder: Path) -> None:
        """classes.json: the last held-out figures with the confusion matrix. For pictures, how bytes are scaled."""
        if self._report:
            (folder / "classes.json").write_text(json.dumps(self._report, indent=1, ensure_ascii=False) + "\n")
        if isinstance(self.examples.inputs, Pictures):
            (folder / "preprocessor_config.json").write_text(
                json.dumps(_processor(self.examples.inputs), indent=1) + "\n"
            )

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_id if self.tokenizer else None
        return 0 if pad is None else pad

    def _check(self, model: Transformer) -> None:
        """Refuses a model with another head or input; its config.json will name the classes."""
        config = model.config
        if config.head != "classes" or config.classes != len(self.class_names):
            raise ConfigError(
                f"classify: the model's head is {config.head} of {config.classes}, "
                f"{format_count(len(self.class_names), 'class is', 'classes are')} "
                'needed; put them on with: lapis.model.transformer.put_head(model, "classes", objective.class_names)'
            )
        if isinstance(self.examples.inputs, Pictures):
            fits(model, self.examples.inputs)
        elif config.image is not None:
            raise ConfigError(
                "classify: a vit model takes pictures; give no tokenizer, and .npz or a folder of pictures"
            )
        config.extra.update(class_fields(self.class_names))
        if self.tokenizer and config.causal and self.tokenizer.pad_id is not None:
            config.extra.setdefault("pad_token_id", self.tokenizer.pad_id)  # where others look for a text's last token
        model.drop(self.dropout)

    def _hidden(self, inputs: list[list[int]], seed: int, places: Sequence[int]) -> list[list[int]]:
        """Some tokens of each text masked, or left out; special ones stay, and one token at least."""
        if not self.hide or self.tokenizer is None:
            return inputs
        mask = self.tokenizer.id(self.tokenizer.named["mask_token"]) if "mask_token" in self.tokenizer.named else None
        special = set(self.tokenizer.special.values())
        hidden_inputs = []
        for ids, place in zip(inputs, places, strict=True):
            hidden = random_of(seed, place).random(len(ids)) < self.hide
            pairs = [(token, bool(hit) and token not in special) for token, hit in zip(ids, hidden, strict=True)]
            if mask is None:
                visible = [token for token, hit in pairs if not hit]
            else:
                visible = [mask if hit else token for token, hit in pairs]
            hidden_inputs.append(visible or ids)
        return hidden_inputs

    def _shifted(self, pixels_BCHW: Tensor, seed: int, places: Sequence[int]) -> Tensor:
        """Each picture moved by up to `shift` pixels; what comes in at the edge repeats the edge."""
        if not self.shift:
            return pixels_BCHW
        H, W = pixels_BCHW.shape[2:]
        wide = F.pad(pixels_BCHW, (self.shift,) * 4, mode="replicate")
        moves = [random_of(seed, p).integers(0, 2 * self.shift + 1, 2) for p in places]
        return torch.stack([picture[:, y : y + H, x : x + W] for picture, (y, x) in zip(wide, moves, strict=True)])


class _Examples:
    """Texts as ids, or pictures, with the number of each one's class."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        data: Any,
        context: int,
        scaling: tuple[int | None, Sequence[float], Sequence[float]],
    ) -> None:
        self.numbers: list[int] = []
        self.inputs: list[list[int]] | Pictures
        if tokenizer is None:
            self.inputs = data if isinstance(data, Pictures) else pictures(data, *scaling)
            self.labels, self.where = list(self.inputs.labels), list(self.inputs.where)
            self.counts: dict[str, int] = {}
            self.digest = self.inputs.digest
            return
        given: list[Any] = [data] if isinstance(data, (str, Path)) else list(data)
        examples: list[Labeled] = given if given and isinstance(given[0], Labeled) else list(labeled(given))
        self.labels, self.where = [e.label for e in examples], [e.where for e in examples]
        self.inputs, cut = encode_framed(tokenizer, [e.text for e in examples], context)
        self.counts = {"tokens": sum(map(len, self.inputs)), "cut": cut}
        digest = hashlib.sha256()
        for example in examples:
            digest.update(json.dumps([example.label, example.text]).encode() + b"\n")
        self.digest = digest.hexdigest()

    def number(self, classes: Sequence[str]) -> None:
        self.numbers = numbers_of(self.labels, self.where, classes)

    def take(self, chosen: Sequence[int]) -> list[list[int]] | Tensor:
        if isinstance(self.inputs, Pictures):
            return self.inputs.take(chosen)
        return [self.inputs[i] for i in chosen]


def _processor(examples: Pictures) -> dict[str, Any]:
    """preprocessor_config.json, as transformers' ViTImageProcessor reads it."""
    C, H, W = examples.shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": H, "width": W},
        "resample": 2,
        "do_rescale": examples.bytes,
        "rescale_factor": 1 / 255,
        "do_normalize": examples.bytes,
        "image_mean": list(examples.mean) * (C // len(examples.mean)),
        "image_std": list(examples.std) * (C // len(examples.std)),
    }
