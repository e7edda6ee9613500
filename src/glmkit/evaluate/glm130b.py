"""Tasks that task files describe: choosing (mul), writing (gen), and perplexity of texts (lm), for every family.

    mul   text and choices -> log-probability of each choice -> the best one        Accuracy
    gen   text -> likeliest tokens, or beams -> the answer                          EM, F1, Accuracy, Contains, ROUGE-L
    lm    text -> windows -> loss of each token                                     PPL of a word, of a token

How each family takes a text is in `blank_text.py`, what files say in `task_file.py`.

Source: evaluation/tasks.py and tasks/lambada of GLM-130B (behaviour, not code). On purpose different: any batch size
for every type; with `unidirectional` a window of lm scores its last tokens only, so that each token counts once.
"""

from __future__ import annotations

import math
import statistics
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkit.data.rows import read_text
from glmkit.engine.beams import BeamSearchStrategy, search
from glmkit.engine.decode import generate_batch
from glmkit.engine.sampling import SamplingOptions
from glmkit.evaluate.adgen import answer_text
from glmkit.evaluate.blank_text import Rendering, choice_scores, writing_prompt
from glmkit.evaluate.matching import best, cut_out
from glmkit.evaluate.perplexity import windows
from glmkit.evaluate.scoring import Frame, Passage, frame_of, score_passages
from glmkit.evaluate.task_file import TaskFile, metrics_of
from glmkit.evaluate.task_rows import Item, data_files, document_rows, read_items
from glmkit.evaluate.tasks import Figure, Row, Settings
from glmkit.evaluate.text import context_tokens, room_tokens, tokenizer_of
from glmkit.loading import Loaded

_BANNED = -65504.0
_LARGEST_LOSS = 20.0  # of a word; e to more is no perplexity of words, as the official code has it


class _Described:
    """What the tasks share.

    Args:
        said: The task file.
        folder: Of the data.
        how: batch_size, max_new_tokens and limit.
    """

    rows_file = "predictions.jsonl"

    def __init__(self, said: TaskFile, folder: Path, how: Settings) -> None:
        self.said, self.folder, self.how = said, folder, how
        self.name = said.name
        self.batch_size = how.batch_size

    @property
    def files(self) -> list[Path]:
        """The data, which stands beside the task file."""
        return [file for _, file in data_files(self.said, self.folder)]

    def rendering(self, loaded: Loaded) -> Rendering:
        """How texts become rows of this model."""
        said = self.said
        longest = min(said.max_seq_length, context_tokens(loaded))
        return Rendering(longest, said.use_task_mask, said.unidirectional, said.cut)

    def in_groups(self, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
        """Of several files the figures of each group and file, as the official script prints them, in percent."""
        files: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            files[row["group"]][row["file"]].append(row)
        if sum(map(len, files.values())) < 2:
            return {}
        return {"groups": {group: _of_files(members, names) for group, members in files.items()}}


class Choosing(_Described):
    """A task of type mul."""

    def items(self, loaded: Loaded) -> list[Item]:
        """Reads the rows; see `Task.items`."""
        tokenizer_of(loaded)
        return list(read_items(self.said, self.folder, self.how.limit))

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Scores the choices; see `Task.answer`."""
        scores = choice_scores(
            loaded.model,
            tokenizer_of(loaded),
            [item.text for item in items],
            [item.choices for item in items],
            self.rendering(loaded),
            batch_size=self.batch_size,
            progress=progress,
        )
        rows = []
        for item, own in zip(items, scores):
            answer = max(range(len(own)), key=own.__getitem__)
            right = {metric: float(answer == item.label) for metric in metrics_of(self.said)}
            rows.append({**_where(item), "label": item.label, "answer": answer, "scores": own, **right})
        return rows

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """The task's metrics, over all rows."""
        return [Figure(metric, [row[metric] for row in rows]) for metric in metrics_of(self.said)]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Figures of groups and files."""
        return self.in_groups(rows, metrics_of(self.said))


class Writing(_Described):
    """A task of type gen."""

    def items(self, loaded: Loaded) -> list[Item]:
        """Reads the rows; see `Task.items`."""
        tokenizer_of(loaded)
        return list(read_items(self.said, self.folder, self.how.limit))

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Writes answers and compares them with the targets; see `Task.answer`."""
        said, tokenizer = self.said, tokenizer_of(loaded)
        longest = self.how.max_new_tokens or said.max_gen_length
        rendering = self.rendering(loaded)
        prompts = [
            writing_prompt(tokenizer, item.text, rendering, max_new_tokens=longest, chat=said.ask == "chat")
            for item in items
        ]
        texts = self._written(loaded, prompts, longest, progress)
        rows = []
        for item, text in zip(items, texts):
            answer = cut_out(text, stop=said.stop, pattern=said.answer, first_word=said.finds_words)
            # As the official code has it: what the vocabulary makes of a target, so that both have its punctuation.
            targets = [tokenizer.decode_ids(tokenizer.encode_text(target)) for target in item.targets]
            values = {metric: best(metric, answer, targets) for metric in metrics_of(said)}
            rows.append({**_where(item), "targets": item.targets, "text": text, "answer": answer, **values})
        return rows

    def _written(
        self,
        loaded: Loaded,
        prompts: Sequence[list[int]],
        longest: int,
        progress: Callable[[int], None] | None,
    ) -> list[str]:
        said, tokenizer = self.said, tokenizer_of(loaded)
        if said.sampling_strategy == "BaseStrategy":
            answers = generate_batch(
                loaded.model,
                prompts,
                SamplingOptions(temperature=0.0),
                stop_ids=tokenizer.stop_ids,
                max_new_tokens=longest,
                batch_size=self.batch_size,
                progress=None if progress is None else lambda done, _: progress(done),
            )
            read = answer_text if said.ask == "chat" else lambda tokenizer, ids: tokenizer.decode_ids(ids)
            return [str(read(tokenizer, ids)).strip() for ids in answers]
        strategy = self._beams(tokenizer)
        texts = []
        for prompt in prompts:
            found = search(loaded.model, prompt, strategy, max_new_tokens=longest)
            beams = [
                tokenizer.decode_ids([token for token in one.ids[len(prompt) :] if token not in tokenizer.stop_ids])
                for one in found
            ]
            texts.append(_with_a_word(beams) if said.finds_words else beams[0].strip())
            if progress is not None:
                progress(len(texts))
        return texts

    def _beams(self, tokenizer: Any) -> BeamSearchStrategy:
        said = self.said
        options: dict[str, Any] = {
            "length_penalty": said.length_penalty,
            "no_repeat_ngram_size": said.no_repeat_ngram_size,
            "min_gen_length": said.min_gen_length,
            "end_ids": tokenizer.stop_ids,
        }
        if not said.finds_words:
            return BeamSearchStrategy(said.num_beams, **options)
        return WordStrategy(said.num_beams, [tokenizer.encode_text(mark) for mark in string.punctuation], **options)

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """The task's metrics, over all rows."""
        return [Figure(metric, [row[metric] for row in rows]) for metric in metrics_of(self.said)]

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Figures of groups and files, and how many answers were empty."""
        empty = sum(not row["answer"] for row in rows)
        return {"empty": empty, **self.in_groups(rows, metrics_of(self.said))}


class WordStrategy(BeamSearchStrategy):
    """Beam search for a word: it begins with no punctuation, and marks of a single token never come.

    Args:
        num_beams: Beginnings, and answers, that are kept.
        marks: Ids of each mark of punctuation.
        **options: Of `BeamSearchStrategy`.
    """

    def __init__(self, num_beams: int, marks: Sequence[Sequence[int]], **options: Any) -> None:
        self._longer = [list(mark) for mark in marks if len(mark) > 1]
        self._start: int | None = None
        super().__init__(num_beams, banned_ids=sorted({mark[0] for mark in marks if len(mark) == 1}), **options)

    def step(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Moves every beam on by a token; see `BeamSearchStrategy.step`.

        Args:
            logits: (N, V).
            tokens: (N, T) int64.

        Returns:
            Tokens (M, T+1), and the beam that each continues, (M,).
        """
        self._start = tokens.shape[1] if self._start is None else self._start
        begun = tokens.shape[1] - self._start
        logits = logits.float().clone()
        for mark in self._longer:
            if begun == len(mark) - 1:
                same = (tokens[:, -begun:] == torch.tensor(mark[:-1], device=tokens.device)).all(1)
                logits[same, mark[-1]] = _BANNED
        return super().step(logits, tokens)

    def finish(self, tokens: Tensor) -> Any:
        """The answers, best first; see `BeamSearchStrategy.finish`.

        Args:
            tokens: (M, T), as the last step returned them.
        """
        self._start = None
        return super().finish(tokens)


@dataclass(frozen=True)
class DocumentWindow:
    """A window of a document.

    Args:
        where: Document and number of the window.
        group: Group of the file.
        file: Its path below the data's folder.
        known: Ids that an earlier window has scored.
        scored: Ids that this one scores.
        words: Its share of the document's words, as its share of the scored tokens.
    """

    where: str
    group: str
    file: str
    known: list[int]
    scored: list[int]
    words: float


class Modelling(_Described):
    """A task of type lm."""

    def items(self, loaded: Loaded) -> list[DocumentWindow]:
        """Cuts the documents into windows; see `Task.items`."""
        tokenizer = tokenizer_of(loaded)
        window = min(self.said.max_seq_length - 1, room_tokens(loaded, self._frame(tokenizer)))
        found: list[DocumentWindow] = []
        for group, file in data_files(self.said, self.folder):
            for where, text in self._documents(file):
                ids, words = tokenizer.encode_text(text), len(text.strip().split(" "))
                for number, part in enumerate(windows(len(ids), window, min(window, self.said.generation_length))):
                    scored = ids[part.scored : part.last]
                    name = file.relative_to(self.folder).as_posix()
                    share = words * len(scored) / len(ids)
                    known = ids[part.first : part.scored]
                    found.append(DocumentWindow(f"{where}, window {number + 1}", group, name, known, scored, share))
        return found[: self.how.limit]

    def _documents(self, file: Path) -> list[tuple[str, str]]:
        if file.suffix in (".json", ".jsonl", ".csv", ".parquet"):
            return list(document_rows(self.said, file))
        return [(file.name, read_text(file))]

    def _frame(self, tokenizer: Any) -> Frame:
        frame = frame_of(tokenizer)
        return Frame((*frame.before, *frame.between)) if self.said.unidirectional else frame

    def answer(
        self, loaded: Loaded, items: Sequence[Any], first: int, progress: Callable[[int], None] | None = None
    ) -> list[Row]:
        """Scores windows; see `Task.answer`."""
        passages = [Passage(item.known, item.scored) for item in items]
        frame = self._frame(tokenizer_of(loaded))
        scored = score_passages(loaded.model, frame, passages, batch_size=self.batch_size, progress=progress)
        return [
            {
                **_where(item),
                "tokens": len(item.scored),
                "words": item.words,
                "loss": -math.fsum(one.log_probabilities),
            }
            for item, one in zip(items, scored)
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Perplexity of a word, where the texts have words that blanks divide, and of a token."""
        losses, words = [row["loss"] for row in rows], [row["words"] for row in rows]
        found = [Figure("token_perplexity", losses, [row["tokens"] for row in rows], unit="exp", better="less")]
        if sum(losses) <= _LARGEST_LOSS * sum(words):
            found.insert(0, Figure("PPL", losses, words, unit="exp", better="less"))
        return found

    def notes(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """How much was read, and why there may be no perplexity of words."""
        found: dict[str, Any] = {name: sum(row[name] for row in rows) for name in ("tokens", "words")}
        if len(self.figures(rows)) == 1:
            found["PPL"] = f"left out: more than {_LARGEST_LOSS:.0f} nats for each word between blanks"
        return found


def _where(item: Any) -> Row:
    return {"id": item.where, "group": item.group, "file": item.file}


def _with_a_word(beams: Sequence[str]) -> str:
    """The best beam that goes on with punctuation behind its first word, so that the word is whole; else the best."""
    for text in beams:
        parts = text.strip().split(" ")
        if len(parts) >= 2 and parts[1] in string.punctuation:
            return text.strip()
    return beams[0].strip()


def _of_files(files: Mapping[str, Sequence[Row]], names: Sequence[str]) -> dict[str, Any]:
    """Of each metric the largest, the middle and the mean value of the files, the last one weighted by rows."""
    found: dict[str, Any] = {"rows": sum(map(len, files.values())), "files": {}}
    for name, rows in files.items():
        found["files"][name] = {
            metric: round(100 * statistics.fmean(row[metric] for row in rows), 4) for metric in names
        }
    for metric in names:
        values = [one[metric] for one in found["files"].values()]
        mean = statistics.fmean(row[metric] for rows in files.values() for row in rows)
        found[metric] = {
            "max": max(values),
            "median": statistics.median(values),
            "average": round(100 * mean, 4),
        }
    return found
