"""What blank infilling makes blanks of, and how often: the settings, and those of the published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixture:
    """Which blanks are made, and how often; the defaults are those of the official argument parser.

    Attributes:
        bert_prob: Share of calls that cut out short spans.
        gap_sentence_prob: Share of calls that cut out sentences; the rest ("gpt") cuts out one long span.
        bert_ratio: Part of a row that short spans cover.
        gap_sentence_ratio: Part of a row that sentences cover, at least.
        gpt_min_ratio: Shortest long span, as a part of the shortest row; the longest leaves two tokens.
        gpt_infill_prob: Share of long spans that reach to the end of the row, "left to right", without an end to
            predict; the others lie anywhere. The name is the official one, although it says the opposite.
        avg_block_length: Mean of the Poisson law of short spans, in tokens, before zero is excluded.
        max_block_length: Short spans are shorter than this.
        block_mask_prob: Share of the input tokens of short spans that are replaced by [dBLOCK]; never a target.
        context_mask_ratio: Tokens of part A near a blank to replace by [dBLOCK], as a part of the row.
        context_mask_range: How near, in tokens.
        short_seq_prob: Share of calls that first cut their rows into shorter pieces.
        single_span_prob: Share of calls that cut out exactly one short span.
        task_mask: Whether sentences and long spans have blanks of their own, or all have [MASK].
    """

    bert_prob: float = 0.5
    gap_sentence_prob: float = 0.0
    bert_ratio: float = 0.15
    gap_sentence_ratio: float = 0.15
    gpt_min_ratio: float = 0.5
    gpt_infill_prob: float = 0.5
    avg_block_length: float = 3
    max_block_length: int = 40
    block_mask_prob: float = 0.0
    context_mask_ratio: float = 0.0
    context_mask_range: int = 3
    short_seq_prob: float = 0.0
    single_span_prob: float = 0.0
    task_mask: bool = False


_MULTI_TASK = Mixture(
    bert_prob=0.5, gap_sentence_prob=0.3, gpt_min_ratio=0.25, block_mask_prob=0.1, short_seq_prob=0.02, task_mask=True
)
# What the published models were trained with. That of the models with tokens and documents (Doc, 410M, 515M) is the
# paper's description; the others are the official scripts.
MIXTURES = {
    "token": Mixture(bert_prob=1.0),
    "token_roberta": Mixture(bert_prob=1.0, task_mask=True),
    "token_document": Mixture(),
    "2b": Mixture(**{**vars(_MULTI_TASK), "bert_prob": 0.4}),
    "large_chinese": Mixture(**{**vars(_MULTI_TASK), "bert_prob": 0.4}),
    "10b": _MULTI_TASK,
    "10b_stage2": Mixture(**{**vars(_MULTI_TASK), "bert_prob": 0.4, "short_seq_prob": 0.5, "single_span_prob": 0.05}),
    "10b_chinese_stage2": Mixture(**{**vars(_MULTI_TASK), "short_seq_prob": 0.5}),
}
