"""The languages of texts and replies by their codes: held-out texts in, codes and the language of each reply out.

What is not built in is told by its own held-out text. Malay and Indonesian are too near to be told apart by a sentence:
where one of them is the language, the other is not among those that a reply may be in, and nobody is said to have
written either who did not say so.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from lapis.language.card.scores import HeldOutText
from lapis.training.rewards.language import SAMPLES, SCRIPTS, TWINS, Detector, detector

KNOWN = tuple(dict.fromkeys((*SCRIPTS, *SAMPLES)))
SURE = 0.5
MOSTLY = 0.8  # share of documents in a language, from which on a text is said to be in it
LOOKED_AT = 200  # documents
PIECE = 1000  # characters of a document


@dataclass(frozen=True)
class Languages:
    """codes: Of each text the code that replies are judged by, its own name where it has none. detect: What judges."""

    codes: Mapping[str, str]
    detect: Detector

    def of(self, text: str) -> str:
        """The code of the language that a text is surely in; "" for none."""
        sure = self.detect(text[:PIECE])
        best = max(sure, key=sure.__getitem__)
        return best if sure[best] >= SURE else ""


def name_languages(held: Mapping[str, HeldOutText]) -> Languages:
    """What tells the languages of some held-out texts, and all others that are known, apart."""
    codes: dict[str, str] = {}
    left_out: set[str] = set()
    for name, one in held.items():
        code = one.code or main_language(one.texts)
        if code in TWINS:
            left_out |= {TWINS[code]} if one.code else {code, TWINS[code]}
        codes[name] = one.code or ("" if code in TWINS else code) or name
    unknown = {code: " ".join(held[name].texts) for name, code in codes.items() if code not in KNOWN}
    rivals = [code for code in (*KNOWN, *unknown) if code not in left_out - set(codes.values())]
    return Languages(codes, detector(rivals, unknown))


def main_language(texts: Iterable[str]) -> str:
    """The code of the language that most of some texts are in; "" where there is no such one."""
    counts = Counter(_codes(texts))
    code = counts.most_common(1)[0][0] if counts else ""
    near = counts[code] + counts[TWINS.get(code, "-")]
    return code if near >= MOSTLY * counts.total() else ""


def language_shares(texts: Iterable[str]) -> dict[str, float]:
    """What some texts look like -> the share of them that does, the largest first.

    Malay and Indonesian are one ("id or ms"), since nobody said which it is; "" is no language that is known.
    """
    codes = _codes(texts)
    counts = Counter(" or ".join(sorted((code, TWINS[code]))) if code in TWINS else code for code in codes)
    return {name: count / len(codes) for name, count in counts.most_common()}


def _codes(texts: Iterable[str]) -> list[str]:
    """What the first of some texts look like."""
    languages = Languages({}, detector(KNOWN))
    return [languages.of(text) for text in islice(texts, LOOKED_AT)]


def share_in_language(code: str, texts: Iterable[str]) -> float:
    """The share of texts that look like a language more than like any other that is known.

    Args:
        code: Of the language, such as "ms"; one of those that are built in.
        texts: Documents; the first ones are looked at, and of each its beginning.
    """
    languages = Languages({}, detector([other for other in KNOWN if other != TWINS.get(code)]))
    marks = [languages.of(text) == code for text in islice(texts, LOOKED_AT)]
    return sum(marks) / max(1, len(marks))
