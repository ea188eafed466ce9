"""The language of a reply: first by script, then, among languages of one script, by a small classifier.

The classifier is naive Bayes over pieces of one to three letters, made in a moment from a sample of each language: a
few sentences of everyday words that stand here, or files of one's own, which near languages (Malay and Indonesian)
need. Leaves out: replies in which languages alternate by word.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from lapis.config import nearest
from lapis.errors import ConfigError
from lapis.text.corpus.corpus import texts
from lapis.training.rewards.builtin import Function

SCRIPTS = {
    "ko": ("HANGUL",), "zh": ("CJK",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "th": ("THAI",), "el": ("GREEK",),
    "he": ("HEBREW",), "ar": ("ARABIC",), "hi": ("DEVANAGARI",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",),
    "ta": ("TAMIL",), "bn": ("BENGALI",), "uk": ("CYRILLIC",), "ru": ("CYRILLIC",), "bg": ("CYRILLIC",),
}  # fmt: skip
"""Scripts by the first word of their letters' Unicode names; Latin for the rest."""

SAMPLES = {
    "en": "The people who live in this house have two children, and they are going to school today. It is not what I "
    "would say, but there was a good reason for that. You can see which of them will come with us when the rain stops.",
    "ms": "Saya tidak boleh datang kerana kereta saya rosak. Mereka hendak pergi ke pejabat itu pada hari Isnin. "
    "Awak ialah kawan yang baik, dan wang itu untuk anak-anak di sekolah. Apakah nama bandar ini? Kami mahu "
    "cuba lagi esok. Perbezaan kualiti, universiti, aktiviti, komuniti dan maklumat; syarikat, kerajaan, "
    "projek, pelajar, kaedah, ujian, akaun, fail, percuma, muat turun. Sila faham dahulu; mereka berbeza, "
    "bahawa, daripada, sahaja, lapan, polis, elektrik.",
    "id": "Saya tidak bisa datang karena mobil saya rusak. Mereka ingin pergi ke kantor itu pada hari Senin. Kamu "
    "adalah teman yang baik, dan uang itu untuk anak-anak di sekolah. Apa nama kota ini? Kami mau coba lagi "
    "besok. Perbedaan kualitas, universitas, aktivitas, komunitas dan informasi; perusahaan, pemerintah, "
    "proyek, siswa, metode, tes, akun, berkas, gratis, unduh. Silakan paham dulu; mereka berbeda, bahwa, "
    "dari, saja, delapan, polisi, listrik.",
    "de": "Die Leute, die in diesem Haus wohnen, haben zwei Kinder, und sie gehen heute in die Schule. Ich würde das "
    "nicht sagen, aber es gab einen guten Grund dafür. Wir kommen mit euch, wenn der Regen aufhört, oder auch später.",
    "fr": "Les gens qui habitent dans cette maison ont deux enfants, et ils vont à l'école aujourd'hui. Ce n'est pas "
    "ce que je dirais, mais il y avait une bonne raison pour cela. Nous venons avec vous quand la pluie s'arrête.",
    "es": "La gente que vive en esta casa tiene dos niños, y hoy van a la escuela. No es lo que yo diría, pero había "
    "una buena razón para ello. Nosotros vamos con ustedes cuando deje de llover, o también más tarde con los otros.",
    "pt": "As pessoas que moram nesta casa têm duas crianças, e hoje elas vão para a escola. Não é o que eu diria, mas "
    "havia uma boa razão para isso. Nós vamos com vocês quando a chuva parar, ou então mais tarde com os outros.",
    "it": "La gente che abita in questa casa ha due bambini, e oggi vanno a scuola. Non è quello che direi, ma c'era "
    "una buona ragione per questo. Noi veniamo con voi quando smette di piovere, oppure più tardi con gli altri.",
    "nl": "De mensen die in dit huis wonen hebben twee kinderen, en zij gaan vandaag naar school. Het is niet wat ik "
    "zou zeggen, maar er was een goede reden voor. Wij komen met jullie mee als de regen ophoudt, of ook later.",
    "tr": "Bu evde yaşayan insanların iki çocuğu var ve bugün okula gidiyorlar. Ben böyle söylemezdim ama bunun için "
    "iyi bir neden vardı. Yağmur durduğunda sizinle geliriz, ya da daha sonra diğerleriyle birlikte gelebiliriz.",
    "vi": "Những người sống trong ngôi nhà này có hai đứa con, và hôm nay chúng đi học. Đó không phải là điều tôi sẽ "
    "nói, nhưng có một lý do chính đáng. Chúng tôi sẽ đi cùng các bạn khi trời tạnh mưa, hoặc muộn hơn.",
    "uk": "Люди, які живуть у цьому будинку, мають двох дітей, і сьогодні вони йдуть до школи. Це не те, що я сказав "
    "би, але на це була добра причина. Ми підемо з вами, коли дощ припиниться, або пізніше, якщо їм так зручніше.",
    "ru": "Люди, которые живут в этом доме, имеют двоих детей, и сегодня они идут в школу. Это не то, что я сказал "
    "бы, но для этого была хорошая причина. Мы пойдём с вами, когда дождь кончится, или позже, если им так удобнее.",
    "bg": "Хората, които живеят в тази къща, имат две деца и днес те отиват на училище. Това не е каквото бих казал, "
    "но имаше добра причина за него. Ние ще дойдем с вас, когато дъждът спре, или по-късно, ако така им е удобно.",
}
TWINS = {"ms": "id", "id": "ms"}  # too near to be told apart by a sentence
_LEAST = 3  # letters; fewer are in no language


@dataclass(frozen=True)
class Detector:
    """How sure it is, for each of some languages, that a text is in it; 0 where there are fewer letters than _LEAST.

    Attributes:
        scripts: Of each language the scripts of its letters.
        tables: Of each language its pieces; a language without is told by its script alone.
    """

    scripts: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Mapping[str, float]]

    def __call__(self, text: str) -> dict[str, float]:
        """Language -> the share of letters in its script, times its probability among those of that script."""
        counts = Counter(_script(c) for c in text if c.isalpha())
        if counts.total() < _LEAST:
            return dict.fromkeys(self.scripts, 0.0)
        shares = {own: sum(counts[one] for one in own) / counts.total() for own in set(self.scripts.values())}
        sure = {code: shares[own] for code, own in self.scripts.items()}
        for own in (own for own, share in shares.items() if share > 0):
            rivals = {code: self.tables[code] for code in self.tables if self.scripts[code] == own}
            if len(rivals) > 1:
                for code, probability in _probabilities(text, rivals).items():
                    sure[code] *= probability
        return sure


def detector(codes: Iterable[str], samples: Mapping[str, str] = MappingProxyType({})) -> Detector:
    """What tells some languages apart.

    Args:
        codes: Of the languages; each is known, or a sample of it is given.
        samples: Language -> text, in place of what is built in.
    """
    listed = {code: samples.get(code) or SAMPLES.get(code, "") for code in codes}
    scripts = {
        code: SCRIPTS.get(code) or (("LATIN",) if code in SAMPLES else _main_script(text))
        for code, text in listed.items()
    }
    return Detector(scripts, {code: _table(text) for code, text in listed.items() if text})


def language(code: str, among: list[str] = [], samples: dict[str, str] = {}) -> Function:  # noqa: B006 (never changed)
    """How sure it is that the reply is in a language: the share of its letters in that language's script, times the
    probability of the language among those of the script. code: "ms". among: the languages to tell apart, by default
    all that are known. samples: files of text by language, in place of what is built in."""
    known = {**dict.fromkeys(SCRIPTS, ""), **SAMPLES, **samples}
    for name in (code, *among):
        if name not in known:
            raise ConfigError(f'reward language: "{name}" is not known; {nearest(name, known)}, or give samples of it')
    rivals = list(dict.fromkeys([code, *(among or known)]))
    sure = detector(rivals, {name: " ".join(texts(samples[name])) for name in rivals if name in samples})

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        return sure(reply)[code]

    return reward


def _main_script(text: str) -> tuple[str, ...]:
    """The script of most letters of a text."""
    most = Counter(_script(c) for c in text[:100_000] if c.isalpha()).most_common(1)
    return (most[0][0],) if most else ("LATIN",)


@lru_cache(1 << 16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0].removesuffix("-COMPATIBILITY")


def _pieces(text: str) -> list[str]:
    """One to three characters of each word, with a blank before and after it."""
    words = [f" {word} " for word in re.findall(r"[^\W\d_]+", text.lower())]
    return [word[i : i + n] for word in words for n in (1, 2, 3) for i in range(len(word) - n + 1)]


def _table(text: str) -> dict[str, float]:
    """Log-probabilities of pieces; "" is one that does not occur. Each piece is counted once more than it occurs."""
    counts = Counter(_pieces(text[:2_000_000]))
    total = math.log(sum(counts.values()) + len(counts) + 1000)
    return {**{piece: math.log(n + 1) - total for piece, n in counts.items()}, "": -total}


def _probabilities(text: str, tables: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    pieces = _pieces(text[:20_000])
    logs = {name: sum(table.get(p, table[""]) for p in pieces) for name, table in tables.items()}
    best = max(logs.values())
    # pieces overlap, so they are not independent: a third of the evidence is nearer to the truth
    weights = {name: math.exp((value - best) / 3) for name, value in logs.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
