"""What a language costs a model, and whether more tokens would pay: `lapis fertility`.

    fertility("smollm2", ["ko/"], replay=["en/"]).recommendation      {"add": 10000, "reason": "..."}

Tokenizers cut the same held-out text into more or fewer tokens, so everything is counted by its bytes: tokens, FLOPs,
bytes of the KV cache, and the bits that the model needs. The curve is what merges that are learned on the rest of the
text would change. Leaves out making the extended model (extend.py).
"""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.towers import language_config
from lapis.errors import CheckpointError, ConfigError
from lapis.evaluation.text import score_text
from lapis.families import ModelConfig, find
from lapis.generation.generate import Decoding
from lapis.generation.options import DecodingRuntime, Sampling
from lapis.generation.ready import open_ready
from lapis.language.extend import carried, open_source
from lapis.language.recommend import Curve, knee_of, recommend
from lapis.language.texts import first_bytes, read_texts, same_as_target
from lapis.model.reading.readable import ReadableModel
from lapis.model.size import measure
from lapis.model.threads import settle_threads
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.folder import BYTE_OF
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.text.tokenizer.vocabulary import BYTE_TOKEN, read_vocabulary

Report = Callable[[float, float | None, str], None]
POINTS = (0, 1000, 2000, 5000, 10_000, 20_000, 30_000, 45_000)  # of the curve
CONTEXT = 1024  # tokens in sight while text is scored and FLOPs are counted
TIMED = 24  # tokens that are generated to see how fast
_TEXT = 50_000_000  # bytes of a language that are read at most
_SPACED = 20  # characters between spaces at most, for words to be what spaces part


@dataclass
class Fertility:
    """What `fertility` measured; `to_json` gives what `lapis fertility --json` prints.

    Attributes:
        model: The model.
        languages: "target", and "replay" where it was given -> figures of its held-out text.
        curve: By the number of added tokens.
        knee: Added tokens beyond which the curve is flat; None without a curve.
        recommendation: `add` and `reason`.
        against: The same figures of a second model, with its name.
        notes: What a user should be told.
    """

    model: str
    languages: dict[str, dict[str, Any]]
    curve: list[dict[str, Any]] = field(default_factory=list)
    knee: int | None = None
    recommendation: dict[str, Any] = field(default_factory=dict)
    against: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


def fertility(
    model: str | os.PathLike[str],
    files: Sequence[str | Path],
    *,
    replay: Sequence[str | Path] = (),
    against: str | os.PathLike[str] | None = None,
    run: bool = True,
    scored: int = 20_000,
    progress: Report = lambda done, total, label: None,
) -> Fertility:
    """Measures what a language costs a model, and what more tokens would change.

    Args:
        model: A model folder, a model of the hub, or a folder with a tokenizer alone.
        files: Text of the language. One document in twenty is held out and measured on; merges are learned on the rest.
        replay: Text of the language that the model knows already.
        against: A second model on the same text.
        run: Load the models where they have weights, for bits per byte and characters per second.
        scored: Bytes of held-out text that bits per byte are measured on.
        progress: Called with what is done, what there is to do (None where nobody knows), and what it is.

    Raises:
        ConfigError: Where less than a byte is to be scored.
        DataError: Where there is no text.
        CheckpointError: For a folder that is damaged.
    """
    if scored < 1:
        raise ConfigError(f"fertility: scored is {scored}; give 1 byte or more")
    progress(0, None, "reading text")
    learn, held = read_texts(files, _TEXT)
    texts = {"target": held}
    if replay:
        texts["replay"] = read_texts(replay, _TEXT)[1]
    folder, checkpoint = open_source(model)
    other_folder, other = open_source(folder if against is None else against)
    Tokenizer.open(other_folder)  # what is wrong with it is told before the first is measured
    result = Fertility(str(model), _languages(folder, texts))
    if why := same_as_target([*learn, *held], texts.get("replay", ())):
        result.notes.append(why)
    config = _shape(checkpoint)
    speed = None
    if run and checkpoint is not None and config is not None and config.causal:
        speed = _run(model, texts, result.languages, scored, progress)
    if against is not None:
        result.against = {"model": str(against), "languages": _languages(other_folder, texts)}
        other_config = _shape(other)
        if run and other_config is not None and other_config.causal:
            _run(against, texts, result.against["languages"], scored, progress)
    try:
        base = ExtendableTokenizer.open(folder)
    except CheckpointError as error:
        result.recommendation = {"add": 0, "reason": f"do not extend: {error}"}
        return result
    _add_curve(result, base, learn, texts, config, checkpoint, speed, progress)
    return result


def _languages(folder: Path, texts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    tokenizer, vocabulary = Tokenizer.open(folder), read_vocabulary(folder)
    byte_level = vocabulary is not None and vocabulary.byte_level
    result = {}
    for name, held in texts.items():
        ids = Counter(i for each in tokenizer.encode_batch(held) for i in each)
        tokens, size = ids.total(), sum(len(text.encode()) for text in held)
        characters, words = sum(map(len, held)), sum(len(text.split()) for text in held)
        single = sum(times for i, times in ids.items() if _is_byte(tokenizer.token(i), byte_level))
        result[name] = {
            "documents": len(held),
            "bytes": size,
            "tokens_per_byte": tokens / size,
            "tokens_per_character": tokens / characters,
            "tokens_per_word": tokens / words if characters < _SPACED * words else None,
            "single_byte_share": single / tokens,
            "vocabulary_share": len(ids) / tokenizer.vocab_size,
            "bits_per_byte": None,
            "characters_per_second": None,
        }
    return result


def _is_byte(token: str, byte_level: bool) -> bool:
    """Whether a token is one byte of a character of several."""
    if byte_level:
        return len(token) == 1 and BYTE_OF.get(token, 0) > 0x7F
    return bool(BYTE_TOKEN.fullmatch(token)) and int(token[3:5], 16) > 0x7F


def _shape(checkpoint: Checkpoint | None) -> ModelConfig | None:
    """The shape of a model of a known family."""
    config = {} if checkpoint is None else language_config(checkpoint.config)
    family = find(config) if config else None
    return family.read_config(config) if family else None


def _run(
    model: str | os.PathLike[str], texts: dict[str, list[str]], languages: dict[str, dict[str, Any]], scored: int,
    progress: Report,
) -> float:  # fmt: skip
    """Adds bits per byte and characters per second; the tokens that the model makes in a second."""
    progress(0, None, f"reading {model}")
    opened, tokenizer = open_ready(str(model), DecodingRuntime())
    settle_threads(next(opened.parameters()).device)
    progress(0, None, "generating")
    speed = tokens_per_second(opened, tokenizer, texts["target"][0][:400])
    for name, held in texts.items():
        label = f"bits per byte, {name}"
        score = score_text(
            opened, tokenizer, first_bytes(held, scored), CONTEXT, progress=partial(_relabel, progress, label)
        )
        languages[name]["bits_per_byte"] = score["bits_per_byte"]
        languages[name]["scored_bytes"] = score["bytes"]
        languages[name]["characters_per_second"] = speed / languages[name]["tokens_per_character"]
    return speed


def _relabel(progress: Report, label: str, done: float, total: float | None) -> None:
    progress(done, total, label)


def tokens_per_second(model: ReadableModel, tokenizer: Tokenizer, prompt: str, count: int = TIMED) -> float:
    """How many tokens a model makes in a second, one after another, behind a prompt."""
    ids = tokenizer.encode(prompt)[: max(1, model.config.context - count - 8)]
    decoding = Decoding(model, [ids], Sampling(max_tokens=count + 4))
    for _ in range(3):  # the prompt, and what a first step sets up
        decoding.step()
    started = time.perf_counter()
    for _ in range(count):
        decoding.step()
    return count / (time.perf_counter() - started)


def _add_curve(
    result: Fertility, base: ExtendableTokenizer, learn: list[str], texts: dict[str, list[str]],
    config: ModelConfig | None, checkpoint: Checkpoint | None, speed: float | None, progress: Report,
) -> None:  # fmt: skip
    counts = base.count_words(learn, lambda done: progress(done, None, "reading text"))
    gained = base.learn(counts, POINTS[-1], progress=lambda done, total: progress(done, total, "learning merges"))
    progress(0, None, "measuring the curve")
    held = base.count_words(texts["target"])
    saved = np.array(base.tokens_saved(held, gained))
    tokens = held.tokens - saved
    padding = max(0, config.vocab - base.size) if config else 0
    added = np.arange(len(saved))
    rows = np.maximum(0, added - padding)
    curve = Curve(tokens / held.bytes, np.array(gained.counts))
    flops = kv = None
    if config is not None:
        context = min(CONTEXT, config.context)
        flops = measure(config, context).flops_per_token + 2 * config.dim * rows
        kv = measure(config, 1).kv_cache_bytes
        curve = dataclasses.replace(curve, flops_per_byte=flops * curve.tokens_per_byte)
    result.recommendation = recommend(curve)
    result.knee = knee_of(curve.tokens_per_byte)
    replay = None
    if "replay" in texts:
        other = base.count_words(texts["replay"])
        replay = (other.tokens - np.array(base.tokens_saved(other, gained))) / other.bytes
    characters = sum(map(len, texts["target"]))
    tables = 1 if config is None or config.tied else 2
    points = sorted({n for n in (*POINTS, result.knee, result.recommendation["add"], len(saved) - 1) if n < len(saved)})
    for n in points:
        grown = int(rows[n]) * tables * config.dim if config else 0
        slower = 1.0 if checkpoint is None or config is None else 1 / (1 + grown / measure(config).total)
        result.curve.append(
            {
                "added": n,
                "tokens_per_byte": float(curve.tokens_per_byte[n]),
                "saved": float(1 - tokens[n] / tokens[0]),
                "replay_tokens_per_byte": None if replay is None else float(replay[n]),
                "rarest": int(min(gained.counts[:n])) if n else None,
                "parameters": grown if config else None,
                "flops_per_byte": None if flops is None else float(flops[n] * curve.tokens_per_byte[n]),
                "kv_bytes_per_byte": None if kv is None else float(kv * curve.tokens_per_byte[n]),
                "characters_per_second": None if speed is None else speed * slower * characters / int(tokens[n]),
            }
        )
    if not gained.enough:
        result.notes.append(carried(gained))
    if counts.cut_marks:
        result.notes.append(
            f"the tokenizer's splitting cuts {counts.cut_marks / counts.marks:.0%} of letters from their marks"
        )
