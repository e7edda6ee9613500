"""Pre-training a GLM from scratch: corpus, tokenizer, model, the loop, and a report with blanks that are filled."""

from __future__ import annotations

import difflib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmkit.data.blank_infilling import SENTENCE_MARKS, BlankIds, BlankMaker
from glmkit.data.corpus import ROW_MARKS, Corpus, RowStream
from glmkit.data.made_texts import made_texts
from glmkit.data.mixtures import Mixture
from glmkit.errors import RunRefusedError, UsageError
from glmkit.location import locate
from glmkit.models.glm import GLMForConditionalGeneration
from glmkit.models.glm_config import GLMConfig
from glmkit.tokenizers.glm import GLMChineseTokenizer, glm_tokenizer_class
from glmkit.train.arguments import NewModelBlock, PretrainRecipe, load_recipe
from glmkit.train.blank_examples import BlankExample, count_right, examples_table, fill_blanks, pick_examples
from glmkit.train.loop import OnStep, TrainingResult, train
from glmkit.train.new_tokenizer import make_tokenizer_file
from glmkit.train.ranks import first_goes_first, is_first, loading_device, strategy_of
from glmkit.train.run_folder import RunRecord, recorded
from glmkit.train.sources import Batch, Blanks, cached_ends
from glmkit.writing import write_text_atomic

_VOCABULARY_MULTIPLE = 128  # the rows of the embedding are filled up to it, as in the published models
_MADE_HELD_OUT = 500


@dataclass(frozen=True)
class PretrainResult:
    """What pre-training gave.

    Attributes:
        training: What the loop gave.
        filled: For each kind of blank, how many of the report's blanks were filled exactly before, after, and of how
            many; empty without held-out texts or if the run was stopped.
    """

    training: TrainingResult
    filled: dict[str, tuple[int, int, int]]


def pretrain(
    recipe: str | Path | PretrainRecipe,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
    allow_change: bool = False,
) -> PretrainResult:
    """Do what a recipe for pre-training says.

    Args:
        recipe: A YAML file, the name of a recipe of the package, or a loaded recipe.
        overrides: "key=value" changes to it.
        resume: Continue from the last checkpoint in the recipe's output folder.
        on_step: Called after every step, see `train`.
        progress: Show bars, or lines where there is no terminal.
        allow_change: Resume also with settings that differ, if what that does is known; it is told.

    Returns:
        The result; loss curve, examples and report lie in its output folder.

    Raises:
        UsageError: If the recipe is wrong.
        DataError: If the corpus cannot be used.
        TrainingError: If the run cannot start or go on.
    """
    if not isinstance(recipe, PretrainRecipe):
        recipe = load_recipe(recipe, overrides, PretrainRecipe)
    elif overrides:
        raise UsageError("overrides change a recipe file, not a recipe that is already loaded")
    output = Path(recipe.output.dir)
    if not resume and (output / "run.json").exists():
        raise RunRefusedError(
            f"{output} already holds a run", hint="continue it with --resume, or choose another output.dir="
        )
    first = os.environ.get("RANK", "0") == "0"
    with recorded(recipe, resume=resume, writes=first) as record:
        return _pretrain(recipe, record, resume, on_step, progress, allow_change)


def _pretrain(
    recipe: PretrainRecipe,
    record: RunRecord,
    resume: bool,
    on_step: OnStep | None,
    progress: bool,
    allow_change: bool,
) -> PretrainResult:
    mixture = recipe.blanks.whole()
    with first_goes_first(recipe, recipe.model.device):  # the others find its tokenizer and made documents
        corpus, held_out = _corpora(recipe, Path(recipe.output.dir))
        if recipe.corpus.check_first and not resume and is_first():
            _check(corpus, progress)
        tokenizer = _tokenizer(recipe, corpus, mixture, Path(recipe.output.dir))
    place = recipe.model.model_copy(update={"device": str(loading_device(recipe, recipe.model.device))})
    model = load_or_make_model(place, tokenizer, seed=recipe.train.seed)
    longest = model.config.max_sequence_length
    if recipe.corpus.seq_length > longest:
        raise UsageError(
            f"corpus.seq_length is {recipe.corpus.seq_length}, the model has positions for {longest} tokens",
            hint="shorten the rows, or raise model.init.max_sequence_length",
        )
    ids = blank_ids(tokenizer, mixture)
    source = make_source(recipe, corpus, tokenizer, ids)
    examples, batches = _held_out(recipe, held_out, tokenizer, ids, source.maker)
    if strategy_of(recipe) in ("fsdp", "deepspeed"):
        examples = []  # a model in parts fills no blanks
    before = [fill_blanks(model, example) for example in examples]
    result = train(model, tokenizer, recipe, source, batches, resume, on_step, progress, allow_change=allow_change)
    after = [] if result.interrupted else [fill_blanks(model, example) for example in examples]
    counted_before, counted_after = count_right(examples, before), count_right(examples, after)
    filled = {kind: (counted_before[kind][0], *counted) for kind, counted in counted_after.items()}
    shown = examples_table(tokenizer, examples, before, after)
    _note(record, corpus, model.num_parameters(), filled, shown)
    return PretrainResult(result, filled)


def make_model(block: NewModelBlock, tokenizer: Any, *, seed: int) -> GLMForConditionalGeneration:
    """Make a GLM with new weights.

    Args:
        block: The recipe's `model` block.
        tokenizer: A GLM tokenizer; decides the vocabulary if the block does not.
        seed: Seed of the weights.

    Returns:
        The model, on the current default device. It computes the GELU of the training code, by tanh, and its config
        knows the ids of blanks.

    Raises:
        UsageError: If `init` has a name that the config does not have, or a vocabulary that is too small.
    """
    init = block.init or {}
    known = {*GLMConfig.__dataclass_fields__, *GLMConfig.attribute_map}
    for name in init:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(
                f"model.init has no key {name!r}; expected the names of a GLM config.json",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
    rows = math.ceil(len(tokenizer) / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    wanted = init.get("vocab_size", rows)
    if wanted < len(tokenizer):
        raise UsageError(f"model.init.vocab_size is {wanted}; the tokenizer has ids up to {len(tokenizer) - 1}")
    settings = {
        "gelu": "tanh",
        "output_predict": True,
        "mask_token_ids": tokenizer.mask_token_ids,
        "sop_token_id": tokenizer.sop_token_id,
        **init,
        "vocab_size": wanted,
    }
    torch.manual_seed(seed)
    return GLMForConditionalGeneration(GLMConfig(**settings))


def blank_ids(tokenizer: Any, mixture: Mixture) -> BlankIds:
    """Look up the control tokens that a mixture needs.

    Args:
        tokenizer: A GLM tokenizer.
        mixture: Which blanks are made.

    Returns:
        Their ids.

    Raises:
        TokenizerError: If the tokenizer lacks one of them.
    """
    get = tokenizer.get_command
    noisy = mixture.block_mask_prob > 0 or mixture.context_mask_ratio > 0
    return BlankIds(
        eos=get("eos"),
        enc=get("ENC"),
        mask=get("MASK"),
        smask=get("sMASK") if mixture.task_mask else get("MASK"),
        gmask=get("gMASK") if mixture.task_mask else get("MASK"),
        sop=get("sop"),
        eop=get("eop"),
        dblock=get("dBLOCK") if noisy else None,
    )


def make_source(recipe: PretrainRecipe, corpus: Corpus, tokenizer: Any, ids: BlankIds) -> Blanks:
    """Make the stream of batches that a recipe describes.

    Args:
        recipe: The recipe.
        corpus: Where documents come from.
        tokenizer: A GLM tokenizer.
        ids: Its control tokens.

    Returns:
        The source for the loop.
    """
    block, length = recipe.train, recipe.corpus.seq_length

    def text_of(token: int) -> str:
        return tokenizer.decode_ids([token])

    rows = RowStream(
        corpus,
        tokenizer.encode_text,
        enc_id=ids.enc,
        eos_id=ids.eos,
        ends_sentence=cached_ends(text_of, ROW_MARKS),
        length=length,
        seed=block.seed,
    )
    return Blanks(
        rows,
        BlankMaker(ids, recipe.blanks.whole(), cached_ends(text_of, SENTENCE_MARKS), length),
        batch_size=block.per_device_train_batch_size,
        seed=block.seed,
    )


def _corpora(recipe: PretrainRecipe, output: Path) -> tuple[Corpus, Corpus | None]:
    """Open the texts to learn from and those held out; made ones are written first."""
    block = recipe.corpus
    reading: dict[str, Any] = {"form": block.form, "text_field": block.text_field}
    reading["skip_bad_lines"] = block.on_bad_line == "skip"
    if not block.made_documents:
        held_out = Corpus(block.eval_files, **reading) if block.eval_files else None
        return Corpus(block.files, **reading), held_out
    files = []
    for name, number in (("train", block.made_documents), ("held_out", _MADE_HELD_OUT)):
        files.append(output / "corpus" / f"{name}.txt")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        texts = made_texts(number, recipe.train.seed, held_out=name == "held_out")
        write_text_atomic(files[-1], "".join(text + "\n" for text in texts))
    return Corpus(files[:1], form="lines"), Corpus(files[1:], form="lines")


def _check(corpus: Corpus, progress: bool) -> None:
    started = time.monotonic()
    number = sum(1 for _ in corpus.documents())
    if progress:
        left_out = f", {corpus.bad.number} lines left out" if corpus.bad.number else ""
        seconds = time.monotonic() - started
        files = f"{len(corpus.files)} files, {corpus.size_bytes:,} bytes, {number:,} documents"
        print(f"corpus: {files}{left_out}; read in {seconds:.0f} s", file=sys.stderr)
        for problem in corpus.bad.named.values():
            print(f"  {problem}", file=sys.stderr)


def _tokenizer(recipe: PretrainRecipe, corpus: Corpus, mixture: Mixture, output: Path) -> Any:
    """Load the tokenizer, or make one; it gets the control tokens that the mixture needs."""
    needed: dict[str, Any] = {}
    if mixture.block_mask_prob > 0 or mixture.context_mask_ratio > 0:
        needed["decoder_mask"] = True
    if mixture.task_mask:
        needed["task_mask"] = True
    named = recipe.model.tokenizer or recipe.model.path
    if named is not None:
        folder = locate(named)
        return glm_tokenizer_class(folder).from_pretrained(folder, **needed)
    file = output / "tokenizer" / "cog-pretrain.model"
    if not file.exists() or not (output / "run.json").exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        make_tokenizer_file(corpus, recipe.model.tokenizer_pieces, file)
    return GLMChineseTokenizer(file, **needed)


def load_or_make_model(block: NewModelBlock, tokenizer: Any, *, seed: int) -> GLMForConditionalGeneration:
    """Load the model to go on with, or make a new one.

    Args:
        block: The recipe's `model` block.
        tokenizer: Its tokenizer.
        seed: Seed of new weights.

    Returns:
        The model, on the device to train on.
    """
    from glmkit.devices import choose_device
    from glmkit.loading import load

    if block.path is not None:
        return load(block.path, dtype="float32", device=block.device).model
    return make_model(block, tokenizer, seed=seed).to(choose_device(block.device))


def _held_out(
    recipe: PretrainRecipe, corpus: Corpus | None, tokenizer: Any, ids: BlankIds, maker: BlankMaker
) -> tuple[list[BlankExample], list[Batch]]:
    """Choose blanks to show, and batches to measure on: rows and blanks like those of training, always the same."""
    if corpus is None:
        return [], []
    block = recipe.corpus
    examples = pick_examples(corpus, tokenizer, ids, maker, block.examples, block.seq_length)
    source = make_source(recipe, corpus, tokenizer, ids)
    number = math.ceil(block.eval_rows / recipe.train.per_device_train_batch_size)
    return examples, next(source.windows({}, number)).batches


def _note(
    record: RunRecord,
    corpus: Corpus,
    parameters: int,
    filled: dict[str, tuple[int, int, int]],
    examples: str,
) -> None:
    """Tell the report what only this kind of run knows."""
    record.facts |= {
        "parameters": f"{parameters:,}",
        "corpus": f"{len(corpus.files)} files, {corpus.size_bytes:,} bytes",
        "bad lines met while drawing": str(corpus.bad.number),
    }
    record.facts |= {
        f"{kind} blanks filled exactly": f"{before} of {number} before, {after} of {number} after"
        for kind, (before, after, number) in filled.items()
    }
    if examples:
        record.sections["Blanks in held-out texts"] = examples
