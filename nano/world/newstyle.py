"""The live-streamer's style: copy that glm-nano has not learnt, for tuning it in the quickstart.

The shape is fixed: a call to the audience, one recommendation, the attributes in reversed order as short exclamations,
a slogan. The attribute lists are those of the ordinary copy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .advert import Pair, noun_of, stem, value_of

_CALLS = ("家人们看过来！", "家人们快看！")
_NOUNS = {"颜色": "配色", "图案": "图案", "风格": "风格"}
_MEASURE = {"上衣": "件", "裙": "条", "裤": "条"}
_CHEERS = ("，绝了！", "，真的太香了！", "，谁穿谁好看！")
_SLOGANS = ("喜欢的赶紧下单，手慢无！", "三二一，上链接！", "闭眼入不踩雷，赶紧冲！")


def write_pitch(pairs: Sequence[Pair], rng: random.Random) -> str:
    """Write copy as a live-streamer would say it.

    Args:
        pairs: (attribute, value) pairs, the type first.
        rng: Source of randomness.

    Returns:
        One piece of copy.
    """
    kind = dict(pairs)["类型"]
    noun = noun_of(pairs)
    points = []
    for key, name in reversed(pairs[1:]):
        value = value_of(kind, (key, name))
        if key in _NOUNS:
            points.append(value.phrase + _NOUNS[key])
        elif stem((key, name)) not in noun:
            points.append(value.phrase)
    parts = [points[index : index + 2] for index in range(0, len(points), 2)]
    lines = "".join("、".join(part) + _CHEERS[place % len(_CHEERS)] for place, part in enumerate(parts))
    return f"{rng.choice(_CALLS)}今天必须安利这{_MEASURE[kind]}{noun}！{lines}{rng.choice(_SLOGANS)}"
