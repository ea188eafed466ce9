"""The language of a reply: first by script, then, among languages of one script, by a small classifier.

The classifier is naive Bayes over pieces of one to three letters, made in a moment from a sample of each language: a
few sentences of everyday words that stand here, or files of one's own, which near languages (Malay and Indonesian)
need. Leaves out: replies in which languages alternate by word.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
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
_LEAST = 3  # letters; fewer are in no language


def language(code: str, among: list[str] = [], samples: dict[str, str] = {}) -> Function:  # noqa: B006 (never changed)
    """How sure it is that the reply is in a language: the share of its letters in that language's script, times the
    probability of the language among those of the script. code: "ms". among: the languages to tell apart, by default
    all that are known. samples: files of text by language, in place of what is built in."""
    known = {**dict.fromkeys(SCRIPTS, ""), **SAMPLES, **samples}
    for name in (code, *among):
        if name not in known:
            raise ConfigError(f'reward language: "{name}" is not known; {nearest(name, known)}, or give samples of it')
    script = SCRIPTS.get(code, ("LATIN",))
    rivals = [name for name in (among or known) if SCRIPTS.get(name, ("LATIN",)) == script or name == code]
    rivals = list(dict.fromkeys([code, *rivals]))
    samples_of = {name: " ".join(texts(samples[name])) if name in samples else SAMPLES.get(name, "") for name in rivals}
    samples_of = {name: text for name, text in samples_of.items() if text}
    if code not in samples_of:
        samples_of = {}  # its script decides
    tables = {name: _table(text) for name, text in samples_of.items()}

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        letters = [c for c in reply if c.isalpha()]
        if len(letters) < _LEAST:
            return 0.0
        share = sum(_script(c) in script for c in letters) / len(letters)
        return share * (_probability(code, reply, tables) if len(tables) > 1 else 1.0)

    return reward


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


def _probability(code: str, text: str, tables: Mapping[str, Mapping[str, float]]) -> float:
    pieces = _pieces(text[:20_000])
    logs = {name: sum(table.get(p, table[""]) for p in pieces) for name, table in tables.items()}
    best = max(logs.values())
    # pieces overlap, so they are not independent: a third of the evidence is nearer to the truth
    weights = {name: math.exp((value - best) / 3) for name, value in logs.items()}
    return weights[code] / sum(weights.values())
