"""Which class: scores of texts or pictures, and accuracy, F1 and the confusion matrix over held-out ones.

A text is cut at the model's context. Leaves out: several labels for one text, thresholds and ROC curves.

Shapes: B examples, C classes, R rows, T places, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapis.errors import ConfigError, DataError, LapisError
from lapis.families.config import class_names
from lapis.model.scoring import Progress, evaluating
from lapis.model.transformer import Transformer
from lapis.text.corpus.labels import Labeled, numbers_of
from lapis.text.corpus.pictures import Pictures
from lapis.text.rows.sequences import Together, encode_framed, together
from lapis.text.tokenizer.tokenizer import Tokenizer


def class_scores(model: Transformer, batch: Together | Tensor) -> Tensor:
    """Logits, [B, C], of texts side by side or of pictures [B, C, H, W]. With gradients where they are on."""
    if model.config.head not in ("classes", "scalar"):
        raise ConfigError(f"classify: the model's head is {model.config.head}; it has no classes. Train some with: "
                          "objective: classify")  # fmt: skip
    if isinstance(batch, Tensor):
        return model.head(model.hidden(batch)[:, 0])  # type: ignore[no-any-return]
    if int(batch.ids_RT.max()) >= model.config.vocab:
        raise DataError(f"token id {int(batch.ids_RT.max())}: the model has {model.config.vocab:,} rows; is it its "
                        "tokenizer?")  # fmt: skip
    if len(batch.row_B) == len(batch.ids_RT) == 1:  # one text: nothing to keep it apart from
        hidden_RTD = model.hidden(batch.ids_RT)
    else:
        hidden_RTD = model.hidden(batch.ids_RT, positions_BT=batch.positions_RT, segments_BT=batch.segments_RT)
    if model.config.pooling == "mean":
        places = zip(batch.row_B, batch.first_B, batch.last_B, strict=True)
        means = [hidden_RTD[row, first : last + 1].mean(0) for row, first, last in places]
        return model.head(torch.stack(means))  # type: ignore[no-any-return]
    places_B = batch.last_B if model.config.causal else batch.first_B
    return model.head(hidden_RTD[batch.row_B, places_B])  # type: ignore[no-any-return]


def predict(
    model: Transformer,
    examples: Sequence[Sequence[int]] | Pictures,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Logits of all examples, [N, C] float32, in their order. Texts are given as ids (`encode_framed`)."""
    device = next(model.parameters()).device
    logits: NDArray[np.float32] = np.empty((len(examples), model.config.classes), np.float32)
    order = list(range(len(examples)))
    if not isinstance(examples, Pictures):
        order.sort(key=lambda i: len(examples[i]))
    with evaluating(model):
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            inputs: Together | Tensor = (
                examples.take(numbers) if isinstance(examples, Pictures) else together([examples[i] for i in numbers])
            )
            logits[numbers] = class_scores(model, inputs.to(device)).float().cpu().numpy()
            if progress:
                progress(start + len(numbers), len(order))
    return logits


@dataclass(frozen=True)
class Prediction:
    """What a classifier makes of one input.

    probabilities: by class, the likeliest first; they add up to 1, save where config.json says that a text may have
    several labels: then each class has its own. score: what a head of one number says, else None. cut: the text was
    longer than the context.
    """

    label: str | None
    probabilities: dict[str, float]
    score: float | None = None
    cut: bool = False


def classify(
    model: Transformer,
    tokenizer: Tokenizer | None,
    inputs: Sequence[str] | Pictures,
    *,
    context: int | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The class of each text or picture, with probabilities.

    Raises:
        ConfigError: The model has no classes, or texts are given and there is no tokenizer.
        DataError: Pictures of another size than the model's.
    """
    if isinstance(inputs, Pictures):
        fits(model, inputs)
        logits, cut = predict(model, inputs, progress=progress), [False] * len(inputs)
    else:
        if tokenizer is None:
            raise ConfigError("classify: texts need a tokenizer; this model has none")
        room = min(context or model.config.context, model.config.context)
        ids, _ = encode_framed(tokenizer, inputs, room)
        whole, _ = encode_framed(tokenizer, inputs, 2**31)
        logits, cut = predict(model, ids, progress=progress), [len(a) < len(b) for a, b in zip(ids, whole, strict=True)]
    values = torch.from_numpy(logits).double()
    if not bool(values.isfinite().all()):
        number = int((~values.isfinite()).any(-1).int().argmax())
        raise LapisError(f"classify: the model computes NaN or Inf for input {number + 1}; try --dtype float32")
    if model.config.head == "scalar":
        return [Prediction(None, {}, float(row[0]), long) for row, long in zip(values, cut, strict=True)]
    several = model.config.extra.get("problem_type") == "multi_label_classification"
    shares = values.sigmoid() if several else values.softmax(-1)
    names = class_names(model.config)
    predictions = []
    for row, long in zip(shares.tolist(), cut, strict=True):
        ranked = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
        predictions.append(Prediction(ranked[0][0], dict(ranked), None, long))
    return predictions


def score_classes(
    model: Transformer,
    tokenizer: Tokenizer | None,
    examples: Sequence[Labeled] | Pictures,
    *,
    context: int | None = None,
    positive: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy, F1 and the rest of `figures` on held-out examples, and `loss` in nats.

    Raises DataError, naming file and line, for a label that the model has no class for.
    """
    names = class_names(model.config)
    if isinstance(examples, Pictures):
        truth = numbers_of(examples.labels, examples.where, names)
        fits(model, examples)
        logits = predict(model, examples, progress=progress)
    else:
        if tokenizer is None:
            raise ConfigError("classify: texts need a tokenizer; this model has none")
        truth = numbers_of([e.label for e in examples], [e.where for e in examples], names)
        room = min(context or model.config.context, model.config.context)
        ids, _ = encode_framed(tokenizer, [e.text for e in examples], room)
        logits = predict(model, ids, progress=progress)
    return {**figures(truth, logits.argmax(1).tolist(), names, positive), "loss": loss_of(logits, truth)}


def fits(model: Transformer, examples: Pictures) -> None:
    """Raises DataError where the model takes pictures of another size, or none."""
    image = model.config.image
    if image is None:
        raise DataError(f"these are pictures; a {model.config.family} model reads text. Give texts, or a vit model")
    expected = (image.channels, image.size, image.size)
    if examples.shape != expected:
        spelled = ["x".join(map(str, shape)) for shape in (examples.shape, expected)]
        raise DataError(
            f"the pictures are {spelled[0]} (channels, height, width), the model takes {spelled[1]}; "
            f"give resize={image.size}, or pictures of that kind"
        )


def loss_of(logits: NDArray[np.float32], truth: Sequence[int]) -> float:
    """Mean cross entropy in nats."""
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.tensor(truth)))


def figures(
    truth: Sequence[int], predicted: Sequence[int], names: Sequence[str], positive: str | None = None
) -> dict[str, Any]:
    """{accuracy, f1_macro, f1, positive, n, classes, confusion, by_class}.

    f1_macro: the mean over all classes; one that is neither there nor predicted counts as 0. f1: of the positive class,
    where there are two (default: the second); else None. confusion[i][j]: how many of class i were taken for class j.
    by_class: precision, recall, f1 and n of each; 0 where there is none. Raises ConfigError for a
    `positive` that is no class.
    """
    C = len(names)
    confusion: NDArray[np.int64] = np.zeros((C, C), np.int64)
    np.add.at(confusion, (np.asarray(truth, np.int64), np.asarray(predicted, np.int64)), 1)
    right = confusion.diagonal().astype(np.float64)
    predicted_C, there_C = confusion.sum(0), confusion.sum(1)
    precision, recall = right / np.maximum(predicted_C, 1), right / np.maximum(there_C, 1)
    f1 = 2 * right / np.maximum(predicted_C + there_C, 1)
    if positive is None and C == 2:
        positive = names[1]
    if positive is not None and positive not in names:
        raise ConfigError(f'positive is "{positive}"; the classes are {", ".join(names)}')
    return {
        "accuracy": float(right.sum() / max(len(truth), 1)),
        "f1_macro": float(f1.mean()),
        "f1": None if positive is None else float(f1[list(names).index(positive)]),
        "positive": positive,
        "n": len(truth),
        "classes": list(names),
        "confusion": confusion.tolist(),
        "by_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, there_C, strict=True)
        },
    }
