"""Grammar that turns an English attribute list into English advertising copy."""

from __future__ import annotations

import random
from collections.abc import Sequence

Pair = tuple[str, str]


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = (line.strip().split("|") for line in text.strip().splitlines())
    return {name: tuple(effects.split("/")) for name, effects in rows}


_TYPES = ("dress", "skirt", "shirt", "coat", "jacket", "sweater", "hoodie", "trousers", "jeans", "shorts")
_PLURAL = frozenset({"trousers", "jeans", "shorts"})

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "color": _table("""
black|goes with everything/always looks smart
white|looks fresh and clean/feels light and bright
red|catches every eye/looks warm and bold
blue|is as calm as the sea/looks cool and quiet
green|brings a touch of spring/looks fresh and natural
yellow|is as bright as sunshine/makes every day happy
pink|looks sweet and soft/is gentle and lovely
grey|is easy to match/looks quiet and modern
brown|feels warm and earthy/is perfect for autumn
purple|looks rare and elegant/adds a little mystery
"""),
    "style": _table("""
simple|never goes out of fashion/is easy to love
elegant|turns heads at every party/shows good taste
casual|is made for lazy weekends/keeps you relaxed
vintage|tells a story of old days/has a charm of its own
sporty|is ready to move with you/is full of energy
sweet|makes you smile/is as lovely as candy
cool|stands out in the street/has a strong character
classic|looks good year after year/is always right
"""),
    "material": _table("""
cotton|is soft on the skin/breathes well in summer
wool|keeps you warm in winter/is thick and cosy
silk|shines softly/feels smooth and cool
linen|stays cool on hot days/has a natural touch
denim|is strong and lasts for years/gets better with every wash
lace|looks light and romantic/is fine and delicate
velvet|feels rich and smooth/has a deep shine
leather|is tough and handsome/keeps the wind out
"""),
    "fit": _table("""
slim|shows a fine figure/makes you look taller
loose|gives you room to move/is easy to wear
straight|keeps the line clean/suits every figure
oversized|is made for layers/feels like a warm hug
"""),
    "pattern": _table("""
floral|brings the garden to you/looks fresh and romantic
striped|makes you look slim/is neat and lively
dotted|is playful and cute/adds a happy note
checked|has a school-day charm/is a true classic
plain|is clean and simple/matches everything
printed|is full of life/adds colour to your day
"""),
    "collar": _table("""
round|is simple and comfortable/suits every face
v-neck|makes the neck look longer/is light and pretty
high|keeps the cold away/looks neat and warm
lapel|looks smart at work/adds a formal note
"""),
    "sleeve": _table("""
long|keeps your arms warm/is useful all year
short|keeps you cool/is right for summer
puff|looks sweet and lively/adds a royal touch
flared|moves with every step/looks light and free
"""),
    "length": _table("""
long|looks tall and graceful/keeps you warm
short|looks young and lively/shows your legs
knee-length|is neither too long nor too short/is right for work
"""),
    "detail": _table("""
pockets|are handy for your phone/are useful every day
buttons|add a fine touch/look neat
belt|shows your waist/completes the look
zipper|makes it easy to put on/runs smoothly
hood|keeps the wind out/looks young
ruffles|move like little waves/look soft and sweet
"""),
}

_FRAMES: dict[str, tuple[str, ...]] = {
    "color": ("The {v} colour {e}", "Its {v} tone {e}"),
    "style": ("The {v} style {e}", "Its {v} look {e}"),
    "material": ("The {v} fabric {e}", "Made of {v}, it {e}"),
    "fit": ("The {v} fit {e}", "Its {v} cut {e}"),
    "pattern": ("The {v} pattern {e}", "Its {v} design {e}"),
    "collar": ("The {v} collar {e}", "Its {v} neckline {e}"),
    "sleeve": ("The {v} sleeve {e}", "Its {v} sleeve {e}"),
    "length": ("The {v} length {e}", "Its {v} shape {e}"),
    "detail": ("The {v} {e}", "Its {v} {e}"),
}

_CLOSINGS = (
    "Take it home today.",
    "You will love it.",
    "Wear it every day.",
    "A good choice for you and your friends.",
    "It is made for you.",
    "Enjoy every moment in it.",
)

INSTRUCTIONS = (
    "Write a product description: {c}",
    "Write an advertisement for this product: {c}",
    "Please write a short product description with these attributes: {c}",
    "{c}",
)
INSTRUCTIONS_HELDOUT = ("Please describe this product: {c}", "Write a short advertisement with these attributes: {c}")

_NO_NECK = frozenset({"skirt", "trousers", "jeans", "shorts"})


def sample_attributes(rng: random.Random) -> list[Pair]:
    """Draw one product.

    Args:
        rng: Source of randomness.

    Returns:
        (attribute, value) pairs; the type first, 2 to 4 more.
    """
    kind = rng.choice(_TYPES)
    banned = set()
    if kind in _NO_NECK:
        banned |= {"collar", "sleeve"}
    if kind not in ("dress", "skirt", "coat"):
        banned.add("length")
    keys = [key for key in TABLES if key not in banned]
    chosen = set(rng.sample(keys, rng.choice((2, 3, 3, 4))))
    pairs = [("type", kind)]
    for key in keys:
        if key in chosen:
            values = [v for v in TABLES[key] if not (kind == "jeans" and key == "material" and v != "denim")]
            if key == "detail" and kind not in ("coat", "jacket", "hoodie", "sweater"):
                values.remove("hood")
            pairs.append((key, rng.choice(values)))
    return pairs


def missing(pairs: Sequence[Pair], copy: str) -> list[Pair]:
    """List the attributes that a text does not mention.

    Args:
        pairs: (attribute, value) pairs asked for, the type included.
        copy: Advertising copy.

    Returns:
        The pairs whose value is absent.
    """
    words = copy.lower().translate(str.maketrans(".,?", "   ")).split()
    return [pair for pair in pairs if pair[1] not in words]


def write_copy(pairs: Sequence[Pair], rng: random.Random) -> str:
    """Write one piece of English copy that mentions every attribute.

    Args:
        pairs: (attribute, value) pairs, the type first.
        rng: Source of randomness.

    Returns:
        Two to five short sentences.
    """
    kind = pairs[0][1]
    adjectives = [pair for pair in pairs if pair[0] in ("style", "color", "material")]
    front = [pair for pair in adjectives if rng.random() < 0.6]
    order = {"style": 0, "color": 1, "material": 2}
    words = " ".join([pair[1] for pair in sorted(front, key=lambda pair: order[pair[0]])] + [kind])
    plural = kind in _PLURAL
    starts = ("Meet our {w}.", "Try this {w}.", "Here is the new {w}.", "Looking for a {w}? Here it is.")
    if plural:
        starts = ("Meet our {w}.", "Try these {w}.", "Here are the new {w}.", "Looking for {w}? Here they are.")
    start = rng.choice(starts).format(w=words).replace(" a elegant", " an elegant")
    sentences = [start]
    for key, value in pairs[1:]:
        if (key, value) not in front:
            effect = rng.choice(TABLES[key][value])
            sentences.append(rng.choice(_FRAMES[key]).format(v=value, e=effect) + ".")
    if len(sentences) < 4 or rng.random() < 0.4:
        sentences.append(rng.choice(_CLOSINGS))
    return " ".join(sentences)
