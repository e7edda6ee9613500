"""The blocks of recipes: every setting there is, with its default, its limits and, under it, its help.

Names are those of Hugging Face's training arguments wherever they have one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Protocol, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from glmkit.data.mixtures import MIXTURES, Mixture
from glmkit.evaluate.catalogue import TASKS, is_task_file


class Block(BaseModel):
    """A block of a recipe; unknown keys are refused, keys of other tools that mean the same are read as ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    synonyms: ClassVar[Mapping[str, str]] = {}
    """What other tools call a key -> the key here."""

    @model_validator(mode="before")
    @classmethod
    def _own_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        meant = {key: cls.synonyms.get(key, key) for key in values}
        for key, own in meant.items():
            others = [other for other, same in meant.items() if same == own and other != key]
            if others:
                raise ValueError(f"{key} and {others[0]} are the same; give one of them")
        own_names = {meant[key]: value for key, value in values.items()}
        lists = [name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list]
        return own_names | {name: [own_names[name]] for name in lists if isinstance(own_names.get(name), str)}


@dataclasses.dataclass(frozen=True)
class Given:
    """What a recipe was read from.

    Attributes:
        name: The file, or the recipe of the package.
        text: What it says.
        overrides: The changes to it, "key=value" each.
        overridden: Block and key of each.
    """

    name: str
    text: str
    overrides: tuple[str, ...]
    overridden: frozenset[tuple[str, ...]]


class WholeRecipe(Block):
    """What all kinds of recipes have in common."""

    _given: Given | None = PrivateAttr(None)

    @property
    def given(self) -> Given | None:
        """Return what the recipe was read from; None if it was made in Python."""
        return self._given

    def set_given(self, given: Given) -> None:
        """Note what the recipe was read from.

        Args:
            given: File and changes.
        """
        self._given = given


class ModelBlock(Block):
    """Where the model comes from: an existing one, or a new one from sizes."""

    path: str | None = None
    """Folder, family name or hub id of an existing model."""
    init: dict[str, Any] | None = None
    """Sizes of a new ChatGLM2/3 model to train from scratch, in the words of config.json; needs `tokenizer`."""
    tokenizer: str | None = None
    """Folder with the tokenizer of a new model."""
    dtype: str = "auto"
    """Precision in which frozen weights are loaded; trained weights are always float32."""
    device: str = "auto"
    """Where to compute: auto, cpu, or a device of torch."""
    family: str | None = None
    """What the folder is, if it does not say it itself, for instance chatglm2-6b-32k."""
    quantize: str | None = None
    """Frozen weights in fewer bits: int8 or int4 (searched scales), official-int8, official-int4, bnb-int8 or bnb-nf4;
    or quantization_bit: 8 or 4."""
    adapter: str | None = None
    """Folder of a LoRA or P-Tuning adapter: to measure with its base, or to go on from with the same method."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "model_name_or_path": "path",
        "checkpoint_name_or_path": "path",
        "quantization_bit": "quantize",
        "ptuning_checkpoint": "adapter",
        "torch_dtype": "dtype",
    }

    @field_validator("quantize", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        return {"4": "official-int4", "8": "official-int8", "0": None, "none": None}.get(str(value).lower(), value)

    @model_validator(mode="after")
    def _one_source(self) -> ModelBlock:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either model.path or model.init")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("model.init needs model.tokenizer, the folder of a tokenizer")
        return self


class DataBlock(Block):
    """What to learn from."""

    train_file: str
    """Training records: a JSON, JSON Lines, CSV or Parquet file, or a folder that `glm data prepare` wrote."""
    eval_file: str | None = None
    """Records on which the validation loss is measured, in the same forms."""
    format: str = "auto"
    """What a record looks like: adgen, alpaca, history, conversations, toolalpaca, sharegpt, messages, text, columns;
    auto looks at the first record. For GLM: cloze, seq2seq."""
    task: str | None = None
    """Formats cloze and seq2seq: the published task, such as rte or cnn_dm, for its patterns and words, or lengths."""
    pattern_id: int = Field(0, ge=0)
    """Format cloze: which of the task's patterns asks."""
    prompt_column: str = "content"
    """Format columns: field with the user's text."""
    response_column: str = "summary"
    """Format columns: field with the answer."""
    history_column: str | None = None
    """Format columns: field with earlier [question, answer] pairs."""
    preset: Literal["whole", "paper"] = "whole"
    """whole: cut inside the user's text only, and no end mark behind a cut answer. paper: cut as the official
    scripts do, for comparison with their figures."""
    max_source_length: int | None = Field(None, ge=4)
    """Most tokens of a prompt with its template; longer user texts are shortened, the template never."""
    max_target_length: int | None = Field(None, ge=1)
    """Most tokens of an answer; a cut answer is trained without an end mark."""
    max_length: int = Field(2048, ge=4)
    """Most tokens of a whole record."""
    skip_overlength: bool = False
    """Leave out records that are too long instead of cutting them."""
    packing: bool = False
    """Fill rows of max_length with several records that do not see each other, instead of padding."""
    loss_on: Literal["answers", "all"] = "answers"
    """Learn the assistant's messages only, or every token."""
    mix_file: str | None = None
    """General records to mix in, against forgetting, in the same forms."""
    mix_ratio: float = Field(0.1, ge=0, le=10)
    """Records of mix_file for each record of train_file."""
    max_train_samples: int | None = Field(None, ge=1)
    """Use only the first records of train_file."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Use only the first records of eval_file."""
    num_proc: int = Field(1, ge=1)
    """Processes that make token ids of records."""
    cache_dir: str | None = None
    """Where token ids are kept for the next start; none: glmkit's folder in the user's cache."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "val_file": "eval_file",
        "validation_file": "eval_file",
        "max_input_length": "max_source_length",
        "max_output_length": "max_target_length",
        "max_seq_length": "max_length",
        "cutoff_len": "max_length",
        "preprocessing_num_workers": "num_proc",
        "num_parallel_workers": "num_proc",
    }

    @model_validator(mode="after")
    def _known_task(self) -> DataBlock:
        if self.format not in ("cloze", "seq2seq"):
            if self.task is not None:
                raise ValueError(f"data.task is for the formats cloze and seq2seq, the format is {self.format!r}")
            return self
        if self.format == "cloze":
            from glmkit.data.cloze_patterns import TASKS

            names: Collection[str] = TASKS
            patterns = TASKS[self.task].patterns if self.task in TASKS else ()
            if patterns and self.pattern_id >= len(patterns):
                last = len(patterns) - 1
                raise ValueError(f"{self.task} has the patterns 0 to {last}, data.pattern_id is {self.pattern_id}")
        else:
            from glmkit.data.seq2seq import TASKS as SEQ2SEQ_TASKS

            names = SEQ2SEQ_TASKS
        if self.task not in names:
            raise ValueError(f"data.task is {self.task!r}; tasks of the format {self.format} are {', '.join(names)}")
        return self


class NewModelBlock(Block):
    """A new GLM model, or one to go on with."""

    init: dict[str, Any] | None = None
    """Sizes in the words of config.json; vocab_size follows from the tokenizer if it is left out."""
    path: str | None = None
    """Folder, name or hub id of a GLM to go on with, its tokenizer included, instead of new weights."""
    tokenizer: str | None = None
    """Folder or name of a GLM tokenizer; none: a SentencePiece tokenizer is made from the corpus."""
    tokenizer_pieces: int = Field(2000, ge=64)
    """Pieces of a tokenizer that is made."""
    device: str = "auto"
    """Where to train: auto, cpu, or a device of torch."""

    @model_validator(mode="after")
    def _one_source(self) -> NewModelBlock:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either model.init, the sizes of a new model, or model.path")
        if self.path is not None and self.tokenizer is not None:
            raise ValueError("model.path brings its tokenizer; leave out model.tokenizer")
        return self


class CorpusBlock(Block):
    """Texts, however many."""

    files: list[str] = []
    """Files or patterns to learn from."""
    eval_files: list[str] = []
    """Files or patterns on which the validation loss is measured and blanks are filled."""
    form: Literal["auto", "jsonl", "lines", "paragraphs"] = "auto"
    """jsonl: an object per line; lines: a document per line; paragraphs: blank lines between them; auto: by name."""
    text_field: str = "text"
    """Field with the text, for jsonl."""
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    """What cannot be read ends the run, or is left out and counted."""
    check_first: bool = True
    """Read all files once before training, so that a bad line is found now and not in a week."""
    made_documents: int = Field(0, ge=0)
    """Write so many simple documents in Chinese and English and learn from them, instead of files."""
    seq_length: int = Field(512, ge=48)
    """Most tokens of a row, before blanks are made in it."""
    eval_rows: int = Field(64, ge=1)
    """Rows of eval_files to measure on."""
    examples: int = Field(4, ge=0)
    """Held-out documents in which blanks of every kind are filled for the report."""

    @model_validator(mode="after")
    def _one_source(self) -> CorpusBlock:
        if bool(self.files) == bool(self.made_documents):
            raise ValueError("give either corpus.files or corpus.made_documents")
        if self.made_documents and self.eval_files:
            raise ValueError("corpus.made_documents brings held-out documents of its own; leave out corpus.eval_files")
        return self


class BlanksBlock(Block):
    """Which blanks are made; a published mixture, with changes to it."""

    mixture: str = "token_document"
    """Name of a published mixture; token_document has the defaults of the official argument parser."""
    bert_prob: float | None = Field(None, ge=0, le=1)
    """Share of batches with short spans."""
    gap_sentence_prob: float | None = Field(None, ge=0, le=1)
    """Share of batches with whole sentences; the rest has one long span a row."""
    bert_ratio: float | None = Field(None, gt=0, lt=1)
    """Part of a row that short spans cover."""
    gap_sentence_ratio: float | None = Field(None, gt=0, lt=1)
    """Part of a row that sentences cover, at least."""
    gpt_min_ratio: float | None = Field(None, ge=0, lt=1)
    """Shortest long span, as a part of the row."""
    gpt_infill_prob: float | None = Field(None, ge=0, le=1)
    """Share of long spans that reach to the end of the row (the official name says the opposite)."""
    avg_block_length: float | None = Field(None, gt=0)
    """Mean of the Poisson law of short spans."""
    max_block_length: int | None = Field(None, ge=2)
    """Short spans are shorter than this."""
    block_mask_prob: float | None = Field(None, ge=0, lt=1)
    """Share of the input tokens of short spans that are replaced by noise."""
    context_mask_ratio: float | None = Field(None, ge=0, lt=1)
    """Share of tokens near blanks that are replaced by noise."""
    context_mask_range: int | None = Field(None, ge=1)
    """How near, in tokens."""
    short_seq_prob: float | None = Field(None, ge=0, le=1)
    """Share of batches whose rows are first cut into shorter pieces."""
    single_span_prob: float | None = Field(None, ge=0, le=1)
    """Share of batches with exactly one short span a row."""
    task_mask: bool | None = None
    """Whether sentences and long spans have blanks of their own, [sMASK] and [gMASK]."""

    @model_validator(mode="after")
    def _known(self) -> BlanksBlock:
        if self.mixture not in MIXTURES:
            raise ValueError(f"there is no mixture {self.mixture!r}; known are {', '.join(MIXTURES)}")
        whole = self.whole()
        if whole.bert_prob + whole.gap_sentence_prob > 1:
            raise ValueError(f"bert_prob {whole.bert_prob} and gap_sentence_prob {whole.gap_sentence_prob} exceed 1")
        return self

    def whole(self) -> Mixture:
        """Return the mixture with the changes."""
        changes = self.model_dump(exclude={"mixture"}, exclude_none=True)
        return dataclasses.replace(MIXTURES[self.mixture], **changes)


class MethodBlock(Block):
    """Which parameters learn."""

    name: Literal["full", "freeze", "lora", "ptuning_v2"] = "full"
    """full: all parameters. freeze: the last blocks. lora: small matrices beside frozen ones, saved as a PEFT folder.
    ptuning_v2: learned keys and values in front of every layer's own, saved as the official scripts save them."""
    lora_rank: int = Field(8, ge=1)
    """Rank of the LoRA matrices."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the input of the LoRA matrices."""
    target_modules: list[str] = ["query_key_value"]
    """Names of the linear layers that get LoRA matrices."""
    pre_seq_len: int = Field(128, ge=1)
    """Columns of a P-Tuning prefix."""
    prefix_projection: bool = False
    """Make the prefix with a small network instead of learning its values directly."""
    num_layer_trainable: int = Field(3, ge=1)
    """Blocks that learn with freeze, counted from the last."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "peft_type": "name",
        "r": "lora_rank",
        "num_virtual_tokens": "pre_seq_len",
        "lora_target": "target_modules",
    }

    @field_validator("name", mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        others = {"p_tuning": "ptuning_v2", "prefix_tuning": "ptuning_v2", "ptuning": "ptuning_v2", "sft": "full"}
        return others.get(value.lower(), value.lower()) if isinstance(value, str) else value


class TrainBlock(Block):
    """How to learn."""

    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    """How the learning rate falls after the warm-up; all but constant end at lr_min_ratio."""
    lr_min_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end (at lr_decay_steps, else behind the last step), as a part of learning_rate."""
    lr_decay_steps: int | None = Field(None, ge=1)
    """Step at which the learning rate has fallen, and of which warmup_ratio is a part, instead of the last one."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """Part of the steps over which the learning rate rises from 0."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps, instead of warmup_ratio."""
    num_train_epochs: int = Field(1, ge=1)
    """Passes over the data, unless max_steps is given."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; -1 means num_train_epochs decides."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Records (rows, when packing) per batch of one process, unless tokens_per_batch is given."""
    per_device_eval_batch_size: int | None = Field(None, ge=1)
    """Records per batch when measuring; none: as in training."""
    tokens_per_batch: int | None = Field(None, ge=16)
    """Most tokens per batch, padding included, instead of a number of records."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches of one process per optimizer step; every label token weighs the same whatever the division."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    bf16: bool = False
    """Compute matrix products in bfloat16 (weights, loss and optimizer stay float32)."""
    fp16: bool = False
    """Compute matrix products in float16, with a loss that is scaled so that gradients do not vanish."""
    gradient_checkpointing: bool = False
    """Keep no activations inside blocks and compute them again: less memory, a third more time."""
    loss_chunk_tokens: int | None = Field(None, ge=1)
    """Most label positions whose logits exist at once; their logits are computed again in the backward pass."""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is no number ends the run, or its step is left out and counted."""
    seed: int = Field(42, ge=0)
    """Seed of weights, order of the data and dropout."""
    logging_steps: int = Field(10, ge=1)
    """Write a line of metrics every so many steps."""
    eval_steps: int = Field(-1, ge=-1)
    """Measure the validation loss every so many steps; -1: never before the end."""
    eval_epochs: int = Field(-1, ge=-1)
    """Measure the validation loss after every so many passes over the data; -1: never before the end."""
    predict_with_generate: bool = False
    """At each validation also answer records of eval_file and measure BLEU-4 and ROUGE."""
    max_predict_samples: int = Field(50, ge=1)
    """How many records are answered."""
    probe_prompts: list[str] = []
    """Questions that are answered before, at each validation and after, to see what is learnt and what forgotten."""
    metric_for_best_model: Literal["eval_loss", "bleu-4", "rouge-1", "rouge-2", "rouge-l", "accuracy"] = "eval_loss"
    """What says which checkpoint is the best; the lowest loss, or the highest of the others; accuracy is of cloze."""
    load_best_model_at_end: bool = False
    """Give the best checkpoint of all validations as the result, not the last; it is kept beyond save_total_limit."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """End after so many validations without a better one."""
    save_steps: int = Field(500, ge=-1)
    """Save a checkpoint every so many steps; 0 or -1: only when the run is stopped."""
    save_total_limit: int = Field(2, ge=1)
    """Keep this many checkpoints."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "eval_step_interval": "eval_steps",
        "eval_epoch_interval": "eval_epochs",
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "max_predict_records": "max_predict_samples",
    }

    @model_validator(mode="after")
    def _fits_together(self) -> TrainBlock:
        if self.lr_scheduler_type == "exponential" and self.lr_min_ratio == 0:
            raise ValueError("an exponential learning rate never reaches 0; set lr_min_ratio")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both set; set train.bf16=false or train.fp16=false")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; choose one")
        return self


class DistributedBlock(Block):
    """How several processes, started by torchrun, share the work. One process alone needs nothing of it."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """ddp: each process has the whole model. fsdp: each holds a part of every tensor (FSDP2). deepspeed: ZeRO as
    deepspeed.json says. auto: deepspeed if its file is given, else ddp."""
    deepspeed: str | None = None
    """Path of a deepspeed.json with DeepSpeed's own keys, or deepspeed_zero2 or deepspeed_zero3 of the package; "auto"
    in it is filled from this recipe."""
    cpu_offload: bool = False
    """fsdp: keep parameters and optimizer in the memory of the host."""
    reshard_after_forward: bool = True
    """fsdp: give gathered parameters back after the forward pass (less memory) and gather them again."""
    tensor_parallel: int = Field(1, ge=1)
    """Processes that share every matrix product, where the family allows it."""


class OutputBlock(Block):
    """Where results go."""

    dir: str
    """Folder for checkpoints, metrics, report and the result; one run at a time."""
    report_to: list[Literal["tensorboard"]] = []
    """Trackers that get the metrics too; metrics.jsonl and the report are always written."""

    synonyms: ClassVar[Mapping[str, str]] = {"output_dir": "dir"}


class Recipe(WholeRecipe):
    """A whole recipe for tuning."""

    model: ModelBlock
    """Where the model comes from."""
    data: DataBlock
    """What to learn from."""
    method: MethodBlock = MethodBlock()
    """Which parameters learn."""
    train: TrainBlock = TrainBlock()
    """How to learn."""
    distributed: DistributedBlock = DistributedBlock()
    """How several processes share the work."""
    output: OutputBlock
    """Where results go."""

    @property
    def base(self) -> ModelBlock:
        """The block `model` as it is loaded: where nothing of it learns, in the dtype of the products.

        Autocast would otherwise keep a copy of every frozen weight in that dtype until the backward pass has used it.
        """
        if self.model.dtype != "auto" or self.method.name not in ("lora", "ptuning_v2"):
            return self.model
        dtype = "bfloat16" if self.train.bf16 else "float16" if self.train.fp16 else "auto"
        return self.model.model_copy(update={"dtype": dtype})


class PretrainRecipe(WholeRecipe):
    """A whole recipe for pre-training GLM by blank infilling."""

    model: NewModelBlock
    """Sizes and tokenizer of the new model."""
    corpus: CorpusBlock
    """What to learn from."""
    blanks: BlanksBlock = BlanksBlock()
    """Which blanks to make."""
    method: MethodBlock = MethodBlock()
    """Which parameters learn: all of them."""
    train: TrainBlock = TrainBlock()
    """How to learn; per_device_train_batch_size counts rows."""
    distributed: DistributedBlock = DistributedBlock()
    """How several processes share the work."""
    output: OutputBlock
    """Where results go."""

    @model_validator(mode="after")
    def _everything_learns(self) -> PretrainRecipe:
        if self.method.name != "full":
            raise ValueError("a new model learns with method.name=full")
        if self.train.max_steps < 1:
            raise ValueError("train.max_steps is missing: a corpus is a stream without an end")
        if self.train.tokens_per_batch is not None:
            raise ValueError("train.tokens_per_batch is for records; rows are counted by per_device_train_batch_size")
        return self


class EvaluationData(Block):
    """What to ask, and the answers to compare with."""

    file: str | None = None
    """What the task reads: a file of records (JSON, JSON Lines, CSV, Parquet), a text, or a folder; docs/evaluation.md.
    A task file of GLM-130B's form says itself where its data is, below its own folder or below this one."""
    format: str = "auto"
    """What a record looks like: adgen, alpaca, history, conversations, toolalpaca, sharegpt, messages, columns; auto
    looks at the first record."""
    prompt_column: str = "content"
    """Format columns: field with the user's text."""
    response_column: str = "summary"
    """Format columns: field with the answer."""
    history_column: str | None = None
    """Format columns: field with earlier [question, answer] pairs."""
    max_samples: int | None = Field(None, ge=1)
    """Use only the first records, questions or turns."""
    max_source_length: int | None = Field(None, ge=4)
    """Task adgen: most tokens of a prompt with its template; longer user texts are shortened, the template never."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "eval_file": "file",
        "test_file": "file",
        "val_file": "file",
        "validation_file": "file",
        "max_input_length": "max_source_length",
        "max_eval_samples": "max_samples",
        "max_predict_samples": "max_samples",
    }


class EvaluateBlock(Block):
    """How answers are written, and what is measured of them."""

    task: str
    """adgen, tools, ceval, cmmlu, mmlu, gsm8k, perplexity, lambada, cloze, or a task file of GLM-130B's form."""
    per_device_eval_batch_size: int = Field(32, ge=1)
    """Answers written together."""
    max_target_length: int | None = Field(None, ge=1)
    """Longest answer in tokens; none: the task's own, 256 for adgen and tools. Labels are
    cut with the preset paper only."""
    temperature: float = Field(0.0, ge=0)
    """0 always takes the likeliest token; the official scripts have 0.95."""
    top_p: float = Field(1.0, ge=0, le=1)
    """Only the likeliest tokens that together reach this probability; 1 is off, the official scripts have 0.7."""
    seed: int | None = Field(None, ge=0)
    """Makes sampled answers repeatable."""
    preset: Literal["paper"] | None = None
    """paper: prompts and labels cut as the official scripts do (adgen); none: what measures best."""
    method: str | None = None
    """How a question with options is answered: likelihood, or chain-of-thought as ChatGLM2's own script; none: the
    task's own."""
    shots: int | None = Field(None, ge=0)
    """Examples in front of a question; none: the task's own."""
    subjects: list[str] = []
    """Only these subjects; none: all."""
    window: int | None = Field(None, ge=2)
    """Task perplexity: tokens of text that the model sees at most."""
    stride: int | None = Field(None, ge=1)
    """Task perplexity: by how many tokens the window moves on."""
    extra: dict[str, Any] = {}
    """What a single task knows beyond these."""
    output_dir: str | None = None
    """Folder for predictions and results; none: a new one below runs/."""

    synonyms: ClassVar[Mapping[str, str]] = {
        "batch_size": "per_device_eval_batch_size",
        "max_new_tokens": "max_target_length",
        "max_output_length": "max_target_length",
        "max_decode_length": "max_target_length",
    }


class EvaluationRecipe(WholeRecipe):
    """A whole recipe for measuring a model."""

    model: ModelBlock
    """The model, and the adapter if there is one."""
    data: EvaluationData = EvaluationData()
    """What to ask."""
    evaluate: EvaluateBlock
    """How to answer, and what to measure."""

    @model_validator(mode="after")
    def _measurable(self) -> EvaluationRecipe:
        if self.model.path is None or self.model.tokenizer is not None:
            raise ValueError("an existing model is measured: give model.path, without model.init and model.tokenizer")
        if self.evaluate.task not in TASKS and not is_task_file(self.evaluate.task):
            raise ValueError(f"there is no task {self.evaluate.task!r}: {', '.join(TASKS)}, or the YAML file of a task")
        if self.data.file is None and self.evaluate.task in TASKS:
            raise ValueError(f"data.file is missing: {TASKS[self.evaluate.task].data}")
        if self.evaluate.task == "tools" and self.data.max_source_length is not None:
            raise ValueError("data.max_source_length is for the task adgen; dialogues with tools are never shortened")
        return self


class RunRecipe(Protocol):
    """What the loop needs to know, whatever is learnt."""

    @property
    def method(self) -> MethodBlock:
        """Which parameters learn."""

    @property
    def train(self) -> TrainBlock:
        """How to learn."""

    @property
    def distributed(self) -> DistributedBlock:
        """How several processes share the work."""

    @property
    def output(self) -> OutputBlock:
        """Where results go."""

    @property
    def given(self) -> Given | None:
        """What the recipe was read from."""

    def model_dump(self, *, mode: str, exclude_unset: bool = False) -> dict[str, Any]:
        """Return all settings, or only those that were set."""
