"""Three hundred texts in many scripts, on which a tokenizer and what a file says of it must give the same ids.

Sixty lines, each as it stands and in four variants that tokenizers treat apart: after a space, in capitals, with
numbers and a contraction, over several lines. All of it is in Unicode's composed form (NFC).
"""

import unicodedata

LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'll say it's they've, we're, you'd, I'm, don't; HE'LL SAY IT'S",
    "def f(x: int) -> dict[str, float]:\n    return {'a': x ** 2, \"b\": x // 3}",
    "https://example.org/a?b=c&d=%20#e",
    "3.14159 + 2,718,281 = 1e-10 % 0x7F",
    "a\tb\t\tc    d     e",
    "one\n\ntwo\n\n\nthree\r\nfour\r\n\r\nfive",
    "    indented",
    "trailing spaces   ",
    "(brackets) [and] {braces} <tags/> «quotes» “curly” ‘single’",
    "...!!! ??? --- ___ ***",
    "€100 £50 ¥2000 ₩3000 ₴15 ₽9 $5.00 5¢",
    "α β γ ∑ ∫ √2 ≈ 1.414 ≤ ∞ → ⇒ ∀x∈ℝ",
    "x² + y³ = z⁴, H₂O, ½ + ¼",
    "Selamat pagi! Apa khabar? Saya tinggal di Kuala Lumpur.",
    "Buku-buku itu dibaca berulang-ulang oleh kanak-kanak.",
    "Đường phố Hà Nội đông đúc vào buổi sáng.",
    "Ça va? L'été à la plage, où êtes-vous, Noël?",
    "Größe, Straße, Übung, ẞ",
    "¿Dónde está el niño? ¡Mañana!",
    "Zażółć gęślą jaźń",
    "İstanbul'da ılık bir gün, ığdır",
    "Þetta er íslenska, ðæ",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Årets første snø falt på Ærø",
    "Ķēniņš ēd šķiņķi",
    "Ő és ű a szélen",
    "Привіт! Як справи? Її ґанок і їжак.",
    "Съешь ещё этих мягких французских булок",
    "Ђурђевак љубичица њушка",
    "Қазақша сөйлем: өзен, ұлы, іні",
    "Γειά σου Κόσμε, τι κάνεις; Ὀδυσσεύς",
    "Բարեւ աշխարհ, ինչպես ես։",
    "გამარჯობა მსოფლიო",
    "안녕하세요, 세계! 한국어 문장입니다.",
    "ㅋㅋㅋ ㅠㅠ 값이 얼마예요?",
    "你好，世界！今天天气很好。",
    "繁體中文：龍飛鳳舞，臺灣大學。",
    "𠀀𠮷野家で食べる",
    "こんにちは世界。カタカナとひらがな、漢字。",
    "ﾊﾝｶｸ ＡＢＣ １２３ 全角",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "ສະບາຍດີຊາວໂລກ",
    "សួស្តី​ពិភពលោក",
    "မင်္ဂလာပါ ကမ္ဘာလောက",
    "བཀྲ་ཤིས་བདེ་ལེགས།",
    "नमस्ते दुनिया, यह हिन्दी है। १२३४",
    "বাংলা ভাষা, আমার সোনার বাংলা",
    "ਪੰਜਾਬੀ ਵਿੱਚ ਲਿਖੋ",
    "தமிழ் மொழி மிகவும் பழமையானது",
    "తెలుగు లిపి, ಕನ್ನಡ ಲಿಪಿ",
    "മലയാളം എഴുത്ത് സിംහල අකුරු",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "سلام دنیا، حال شما؟ می‌خواهم",
    "שלום עולם, מה שלומך?",
    "አማርኛ ዓረፍተ ነገር።",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᠮᠣᠩᠭᠣᠯ ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "😀👍🏽👩‍👩‍👧‍👦🇲🇾🇺🇦 ❤️ ☕",
    "zero\u200bwidth, no\u00a0break, em\u2003space, ideographic\u3000space",
    "snake_case camelCase kebab-case SCREAMING_CASE v1.2.3-rc4",
)


def probe() -> list[str]:
    """The three hundred texts."""
    variants = [
        variant
        for line in LINES
        for variant in (
            line,
            f" {line}",
            f"{line.upper()}!?",
            f"{line[:12]} 2024 10000 007's{line[12:]}",
            f"{line}\n\n {line}\n",
        )
    ]
    return [unicodedata.normalize("NFC", text) for text in variants]
