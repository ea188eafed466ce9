"""The palette is measured, not believed: contrast (WCAG 2) and distance under color blindness (Machado 2009, OKLab)."""

import itertools
import math

import pytest

from lapis.report import theme

MACHADO = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.28008, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


LUMINANCE = (0.2126, 0.7152, 0.0722)


def linear(color):
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def contrast(a, b):
    dark, light = sorted(sum(w * v for w, v in zip(LUMINANCE, linear(c), strict=True)) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def oklab(rgb):
    r, g, b = rgb
    lms = (
        0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
        0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
        0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
    )
    x, y, z = (max(v, 0) ** (1 / 3) for v in lms)
    return (
        0.2104542553 * x + 0.793617785 * y - 0.0040720468 * z,
        1.9779984951 * x - 2.428592205 * y + 0.4505937099 * z,
        0.0259040371 * x + 0.7827717662 * y - 0.808675766 * z,
    )


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_of_series_on_the_paper(mode):
    shade = {role: pair[mode] for role, pair in theme.COLORS.items()}
    for ground in ("paper", "wash"):
        assert contrast(shade["ink"], shade[ground]) >= 7
        assert contrast(shade["quiet"], shade[ground]) >= 4.5
        assert contrast(shade["lapis"], shade[ground]) >= 4.5  # links, the best number of a column
    for role in theme.SERIES:
        assert contrast(shade[role], shade["paper"]) >= 3, role


@pytest.mark.parametrize("sight", MACHADO)
@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_series_keep_apart_for_every_kind_of_sight(mode, sight):
    seen = {}
    for role in theme.SERIES:
        rgb = linear(theme.COLORS[role][mode])
        seen[role] = oklab([sum(w * v for w, v in zip(row, rgb, strict=True)) for row in MACHADO[sight]])
    for a, b in itertools.combinations(seen, 2):
        assert math.dist(seen[a], seen[b]) > 0.10, (a, b)


def test_every_color_has_one_dark_twin():
    pairs = [*theme.COLORS.values(), *theme.BLUES, *theme.AMBERS]
    assert len({light for light, _ in pairs}) == len(pairs)  # or a page could not tell two roles apart
    assert theme.to_dark()[theme.color("ink")] == theme.COLORS["ink"][1]


def test_models_of_the_tour_keep_their_colors():
    assert theme.series(["base", "grafted"]) == {"base": 5, "grafted": 0}
    places = theme.series(["mine", "grafted", "yours"])
    assert places["grafted"] == 0 and len(set(places.values())) == 3
    assert len(theme.series(f"run {i}" for i in range(20))) == 20


def test_plain_shows_what_plotly_would_swallow():
    assert theme.plain("<b>&") == "&lt;b&gt;&amp;"
    assert theme.plain("a\n\tb\x00\x7f\ud800") == "a↵⇥b␀\ufffd\ufffd"
    assert theme.plain("a" * 9, 5) == "aaaa…"


def test_ticks_are_powers_of_ten_in_range_and_few():
    assert theme.powers(1, 30000)["ticktext"] == ["1", "10", "100", "1,000", "10,000"]
    assert theme.powers(2e-5, 1)["ticktext"] == ["1e-4", "0.001", "0.01", "0.1", "1"]
    assert len(theme.powers(1e-30, 1)["tickvals"]) <= 8
