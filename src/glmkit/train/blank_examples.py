"""Blanks of held-out texts, filled before and after training: what a pre-training report shows besides figures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from glmkit.data.blank_infilling import BlankIds, BlankMaker, Sample
from glmkit.data.corpus import Corpus, Row
from glmkit.data.mixtures import Mixture

_LONGEST_TEXT = 400  # characters; longer documents are no example
_MOST_TOKENS = 64  # of one filling
# bert_prob and gap_sentence_prob that make one kind of blank only; long spans lie anywhere or reach to the end.
_KINDS = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)


@dataclass(frozen=True)
class BlankExample:
    """A text with blanks.

    Attributes:
        sample: The text, as training would see it.
        ids: The control tokens of its blanks.
    """

    sample: Sample
    ids: BlankIds

    def blanks(self) -> list[int]:
        """Return the places of the blanks in part A."""
        return sorted(set(self.sample.positions[self.sample.sep :]))

    def wanted(self) -> list[list[int]]:
        """Return what was cut out, in the order of the blanks, without its end."""
        spans: dict[int, list[int]] = {}
        for place in range(self.sample.sep, len(self.sample.targets)):
            spans.setdefault(self.sample.positions[place], []).append(self.sample.targets[place])
        # A span up to the end of the row has no eop, but the document's eos.
        ends = (self.ids.eop, self.ids.eos)
        return [span[:-1] if span[-1] in ends else span for span in (spans[blank] for blank in self.blanks())]


def pick_examples(
    corpus: Corpus, tokenizer: Any, ids: BlankIds, maker: BlankMaker, number: int, length: int
) -> list[BlankExample]:
    """Make blanks of each kind in the first short documents of a corpus.

    Args:
        corpus: Held-out texts.
        tokenizer: Turns them into ids.
        ids: The control tokens.
        maker: Knows the mixture that is trained and the ends of sentences.
        number: How many documents for each kind of blank.
        length: Most tokens of a text.

    Returns:
        The examples; kinds that the mixture does not have are left out.
    """
    wanted = maker.mixture
    shares = wanted.bert_prob, wanted.gap_sentence_prob, 1 - wanted.bert_prob - wanted.gap_sentence_prob
    rows = []
    for document in corpus.documents():
        encoded = tokenizer.encode_text(document.text)
        if len(document.text) <= _LONGEST_TEXT and 8 <= len(encoded) <= length - 2:
            rows.append(Row([ids.enc, *encoded, ids.eos], [0, *[1] * (len(encoded) + 1)], document.where))
        if len(rows) == number * len(_KINDS):
            break
    examples = []
    rest = iter(rows)
    for share, (bert, sentence) in zip(shares, _KINDS):
        chosen = list(islice(rest, number))
        if share > 1e-9 and chosen:
            mixture = Mixture(bert_prob=bert, gap_sentence_prob=sentence, gpt_min_ratio=0.3, task_mask=wanted.task_mask)
            one_kind = BlankMaker(ids, mixture, maker.ends_sentence, length)
            samples = one_kind.make(chosen, random.Random(7))
            examples += [BlankExample(sample, ids) for sample in samples]
    return examples


def fill_blanks(model: nn.Module, example: BlankExample) -> list[list[int]]:
    """Fill the blanks of a text from left to right, always with the likeliest token.

    Later fillings see the earlier ones, which stay behind the text, as in training.

    Args:
        model: A GLM.
        example: The text with blanks.

    Returns:
        The ids of each filling, without the end.
    """
    part_a = example.sample.input_ids[: example.sample.sep]
    ids = list(part_a)
    positions = [list(range(len(part_a))), [0] * len(part_a)]
    device = next(model.parameters()).device
    fillings = []
    was_training = model.training
    model.eval()
    for blank in example.blanks():
        filling: list[int] = []
        token = example.ids.sop
        while token not in (example.ids.eop, example.ids.eos) and len(filling) <= _MOST_TOKENS:
            ids.append(token)
            positions[0].append(blank)
            positions[1].append(len(filling) + 1)
            token = _likeliest(model, ids, positions, len(part_a), device)
            filling.append(token)
        fillings.append(filling[:-1])
    model.train(was_training)
    return fillings


@torch.no_grad()
def _likeliest(model: nn.Module, ids: list[int], positions: list[list[int]], sep: int, device: torch.device) -> int:
    def tensor(values: Any) -> Tensor:
        return torch.tensor([values], device=device)

    output = model(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        attention_mask=torch.tensor([sep], device=device),
        use_cache=False,
        logits_to_keep=1,
    )
    return int(output.logits[0, -1].argmax())


def count_right(examples: Sequence[BlankExample], fillings: Sequence[list[list[int]]]) -> dict[str, tuple[int, int]]:
    """Count the blanks that were filled exactly.

    Args:
        examples: The texts.
        fillings: What `fill_blanks` gave for each.

    Returns:
        For each kind of blank, how many were right, and how many there are.
    """
    counted: dict[str, tuple[int, int]] = {}
    for example, filled in zip(examples, fillings):
        right, number = counted.get(example.sample.kind, (0, 0))
        same = sum(ours == wanted for ours, wanted in zip(filled, example.wanted()))
        counted[example.sample.kind] = (right + same, number + len(filled))
    return counted


def examples_table(
    tokenizer: Any,
    examples: Sequence[BlankExample],
    before: Sequence[list[list[int]]],
    after: Sequence[list[list[int]]],
) -> str:
    """Lay out texts with blanks and what was filled in, as Markdown.

    Args:
        tokenizer: Turns ids into text.
        examples: The texts.
        before: The fillings of the untrained model.
        after: Those of the trained one.
    """
    lines = []
    for example, first, last in zip(examples, before, after):
        part_a = example.sample.input_ids[1 : example.sample.sep]
        text = tokenizer.decode_ids([token for token in part_a if token != example.ids.eos])
        lines.append(
            f"\n{_cell(text, _LONGEST_TEXT)}\n\n| | cut out | before training | after training |\n|---|---|---|---|"
        )
        for number, spans in enumerate(zip(example.wanted(), first, last), start=1):
            cells = [_cell(tokenizer.decode_ids(span)) or "(nothing)" for span in spans]
            lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str, longest: int = 60) -> str:
    """Make a text safe for a table, and short; the untrained model repeats itself at length."""
    shown = text if len(text) <= longest else text[: longest // 2] + " …"
    return " ".join(shown.replace("|", "\\|").split()).replace("<", "&lt;")
