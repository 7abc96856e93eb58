"""Words for the synthetic receipts. A third of them is random, so that a model cannot guess them but has to read."""

from __future__ import annotations

import random
import string

RANDOM_SHARE = 1 / 3  # of the words on a receipt
FOOD = """
    nasi goreng ayam bakar sate mie soto bakso rendang gado tahu tempe es teh kopi susu jeruk air mineral
    roti pisang coklat keju telur ikan udang cumi sapi sop iced tea latte mocha espresso cappuccino
    americano milk juice orange lemon mango apple melon berry vanilla chocolate caramel matcha green black
    white hot cold large small regular burger pizza pasta fries chicken beef fish rice noodle soup salad
    bread toast cake donut muffin cookie brownie waffle pancake egg cheese bacon tuna salmon shrimp tofu
    curry ramen sushi udon dumpling spring roll wings combo set family double spicy sweet crispy grilled
    fried steamed extra water cola soda beer wine smoothie yogurt honey sugar cream butter garlic pepper
    tomato onion corn potato mushroom avocado café crème jalapeño
""".split()  # noqa: SIM905
SHOP = """
    warung kedai kopi toko resto cafe bakery bistro kitchen house corner garden star sun moon royal golden
    happy fresh daily city market mart deli grill bar lounge noodle tea coffee pizza burger express point
    plaza park hill river
""".split()  # noqa: SIM905
STREETS = """
    jalan merdeka sudirman gatot melati mawar main high market station park oak mill river church hill lake
""".split()  # noqa: SIM905
FOOTERS = [
    "thank you", "terima kasih", "please come again", "see you soon", "no refund", "have a nice day",
    "selamat menikmati", "follow us", "wifi guest", "keep this slip", "closed", "lunas", "copy",
]  # fmt: skip
_CONSONANTS = "bcdfghjklmnprstvwyz"
_VOWELS = "aeiou"


def random_word(rng: random.Random) -> str:
    """Return a word of 2 to 8 letters, which is pronounceable more often than not."""
    if rng.random() < 0.6:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 3))))
        return word + rng.choice(_CONSONANTS) if rng.random() < 0.5 else word
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))


def word(rng: random.Random, known: list[str]) -> str:
    """Return a random word in a third of the draws, and one of the known words otherwise."""
    return random_word(rng) if rng.random() < RANDOM_SHARE else rng.choice(known)


def phrase(rng: random.Random, known: list[str], longest: int, most: int = 3) -> str:
    """Return one to `most` words of at most `longest` characters in all; if one word alone is longer, it is cut."""
    words = [word(rng, known) for _ in range(rng.choice((1, 1, 2, 2, 3)[: 2 * most]))]
    while len(words) > 1 and len(" ".join(words)) > longest:
        words.pop()
    return " ".join(words)[:longest]


def cased(text: str, case: str) -> str:
    """Return the text in a case: upper, title or lower."""
    return text.upper() if case == "upper" else text.title() if case == "title" else text.lower()
