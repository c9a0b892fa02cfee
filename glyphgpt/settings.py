"""Every setting, declared once: its type, bounds, default and meaning.

A class is a heading of `--help`; the docstring below a setting is its help. `glyphgpt/cli.py` fills these classes from
TOML files and the command line.
"""

import math
import os.path
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1, le=10**6)]  # larger than any machine can use, and products still fit in 64 bits
Count = Annotated[int, Field(ge=1, le=10**12)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SingleLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
PathStr = Annotated[SingleLine, AfterValidator(os.path.expanduser)]
"""A file or folder. Shells do not expand ~ in quotes or after --key=, so it is expanded here."""
DType = Literal["auto", "float32", "bfloat16", "float16"]

PATHS = ("data_dir", "out_dir", "init_from")
"""Settings of train.py that are paths: absolute in a run's config.toml, and absent from checkpoints and reports."""


class Settings(BaseModel):
    """Typed, immutable settings, independent of where their values come from."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def conflicts(self) -> Iterator[str]:
        """Yield one line for each combination of values that is not allowed."""
        yield from ()


class Files(Settings):
    """Data and results"""

    dataset: PathStr = "shakespeare_char"
    """Name of a prepared dataset in data_dir, or the path of its folder."""
    data_dir: PathStr = "data"
    """Folder of the datasets."""
    out_dir: PathStr = "out/run"
    """Folder of this run: checkpoints, metrics and settings."""
    init_from: PathStr = ""
    """Start from the weights and network of this run, checkpoint, or folder with a Hugging Face GPT-2; block_size may
    be smaller and dropout may differ."""


class Network(Settings):
    """The network"""

    n_layer: Size = 4
    """Number of blocks."""
    n_head: Size = 4
    """Attention heads per block; n_embd must be a multiple of it."""
    n_embd: Size = 128
    """Channels: the width of the residual stream."""
    block_size: Annotated[int, Field(ge=1, le=131_072)] = 64
    """Context: how many tokens the model sees at once."""
    dropout: Fraction = 0.0
    """Fraction of activations dropped during training; 0.1 to 0.3 for a text that is seen many times."""
    bias: bool = False
    """Use biases in the linear layers and LayerNorms, as GPT-2 does."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """Position encoding: a learned table (GPT-2), fixed sinusoids (Attention is all you need) or rotary embeddings of
    queries and keys (RoFormer)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization before attention, before the MLP and before the output head."""
    activation: Literal["gelu", "gelu_erf", "relu2"] = "gelu"
    """Activation of the MLP: GELU approximated with tanh (GPT-2), exact GELU (nanoGPT) or ReLU squared (Primer)."""
    qk_norm: bool = False
    """Normalize queries and keys, which allows higher learning rates."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    ngram: Size = 1
    """Above 1: also embed the last 2, 3, ... n tokens together, from hashed tables. They take much memory and little
    computation, and reach a good loss in far fewer steps."""
    ngram_rows: Annotated[int, Field(ge=1, le=10**9)] = 16384
    """Rows of each n-gram table."""
    token_shift: bool = False
    """Add a learned fraction of the previous token's embedding to each embedding."""
    init: Literal["gpt2", "zero"] = "gpt2"
    """Initial weights: GPT-2's, or zero for every matrix that writes to the residual stream or the logits."""

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.n_embd // self.n_head

    def conflicts(self) -> Iterator[str]:
        """Yield one line for each rule that the network's shape breaks; model.py's GPTConfig has the same rules."""
        if self.n_embd % self.n_head:
            yield f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}"
        elif self.position == "rotary" and self.head_size % 2:
            yield f"position = 'rotary' needs an even head size; n_embd / n_head is {self.head_size}"
        if self.position == "sinusoidal" and self.n_embd % 2:
            yield f"position = 'sinusoidal' needs an even n_embd, not {self.n_embd}"


class ModelConfig(Network):
    """A network as a checkpoint describes it: every field of `Network` explicitly, and the vocabulary size.

    It has the fields of model.py's GPTConfig, for code that does not import torch.
    """

    model_config = ConfigDict(strict=True)

    vocab_size: Size

    @model_validator(mode="after")
    def check(self) -> Self:
        """Check that the config is complete and that its sizes fit together; otherwise raise ValueError."""
        if missing := type(self).model_fields.keys() - self.model_fields_set:
            raise ValueError(f"missing: {', '.join(sorted(missing))}")
        for conflict in self.conflicts():
            raise ValueError(conflict)
        return self

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings before sinusoids are added, as in GPTConfig."""
        return math.sqrt(self.n_embd) if self.init == "gpt2" and self.ngram == 1 else 1.0


class Optimization(Settings):
    """Optimization"""

    batch_size: Size = 12
    """Sequences in one forward and backward pass; lower it when memory runs out."""
    gradient_accumulation_steps: Size = 1
    """Micro-batches per update. An update sees batch_size x this many sequences, for any number of processes."""
    max_steps: CountOrZero = 2000
    """Number of updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for every weight, or Muon for the blocks' matrices and AdamW for the rest."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    min_lr: NotNegative = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: CountOrZero = 100
    """Steps over which the learning rate rises to its peak."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """How the learning rate falls, after the warm-up, from learning_rate to min_lr at max_steps. inverse_sqrt: as one
    over the square root of the step, whatever max_steps is, but not below min_lr."""
    weight_decay: NotNegative = 0.1
    """Weight decay of matrices and embeddings; vectors have none."""
    ngram_weight_decay: NotNegative = 0.1
    """Weight decay of the n-gram tables: much larger than weight_decay for a text that is seen more than twice."""
    beta1: Fraction = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: Fraction = 0.99
    """AdamW's decay rate of the mean squared gradient."""
    label_smoothing: Fraction = 0.0
    """Probability that the training targets give to all tokens alike, which also raises the training loss."""
    grad_clip: NotNegative = 1.0
    """Maximum norm to which gradients are scaled down; 0 disables clipping."""
    seed: Seed = 1337
    """Seed of the initial weights, the order of the data and dropout."""


class Evaluation(Settings):
    """Evaluation, logging and checkpoints"""

    eval_every: Count = 250
    """Steps between evaluations on the validation split; each evaluation also saves."""
    eval_tokens: Literal["auto"] | CountOrZero = "auto"
    """Tokens of each evaluation: a random sample of the validation split, the same each time; 0 reads the whole split.
    auto: at most a tenth of the time of a run, and the whole split once at the end if it fits into that time."""
    patience: CountOrZero = 0
    """Stop after this many evaluations in a row without a loss that is better by more than its standard error; 0 never
    stops early."""
    sample_tokens: CountOrZero = 120
    """Tokens of sample text printed at each evaluation."""
    log_every: Count = 10
    """Steps between lines of training loss in metrics.jsonl."""
    save_every: CountOrZero = 0
    """Also save last.safetensors every this many steps; 0 saves at evaluations only."""
    report: bool = True
    """Write out_dir/report.html: curves, samples and settings, for any browser. It renews itself during the run."""
    tensorboard: bool = False
    """Write TensorBoard logs to out_dir (pip install tensorboard)."""
    wandb: bool = False
    """Log to Weights & Biases (pip install wandb)."""
    wandb_project: SingleLine = "glyphgpt"
    """Weights & Biases project."""


class Hardware(Settings):
    """Hardware"""

    device: SingleLine = "auto"
    """cpu, cuda, cuda:1, mps, or auto: the fastest one available."""
    dtype: DType = "auto"
    """Precision of matrix products and activations; weights stay float32. auto: bfloat16 where the GPU or CPU supports
    it, float16 on an older GPU, otherwise float32."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """Threads of the CPU for matrix products; 0 uses one for each core, or OMP_NUM_THREADS."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model with torch.compile, which takes up to half a minute. auto: on CUDA, for 500 steps or more."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) hold the model: a full copy each (ddp), or a shard of every weight each (fsdp),
    for models that are too large for one GPU."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: far less memory, about a third more time."""


class Mode(Settings):
    """Mode (on the command line only)"""

    minutes: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Choose every setting that is not given, so that this machine learns the text best in that many minutes. 0 uses
    the defaults instead."""
    resume: bool = False
    """Continue exactly from out_dir/last.safetensors. `train.py --resume FOLDER` resumes the run in that folder."""
    overwrite: bool = False
    """Replace the run that out_dir holds."""
    eval_only: bool = False
    """Evaluate out_dir/best.safetensors, or last.safetensors if there is no best one yet, and exit."""
    summary: bool = False
    """Print a summary of the model, its shapes, parameters and operations, and exit."""


class TrainSettings(Mode, Hardware, Evaluation, Optimization, Network, Files):  # the last base's fields come first
    """Settings of train.py."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update sees."""
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def conflicts(self) -> Iterator[str]:
        """Yield one line for each combination of values that is not allowed."""
        yield from super().conflicts()
        if self.init == "zero" and self.tie_embeddings:
            yield "init = 'zero' needs an output head of its own; add tie_embeddings = false"
        if self.min_lr > self.learning_rate:
            yield f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}"
        if self.init_from == "resume":
            yield "init_from = 'resume' is nanoGPT's; use --resume here"
        if self.resume and self.overwrite:
            yield "resume and overwrite contradict each other; choose one"
        if 0 < self.minutes < 0.05:
            yield f"minutes = {self.minutes:g} is too short to start; use at least 0.05"
        if self.minutes and self.resume:
            yield "minutes is for new runs; to train a run longer, use --resume with a larger --max_steps"
        if self.minutes and self.eval_only:
            yield "minutes and eval_only contradict each other; choose one"


class SampleSettings(Settings):
    """Settings of sample.py"""

    prompt: str = ""
    """Text to continue; a new line if empty."""
    prompt_file: PathStr = ""
    """Read the prompt from this UTF-8 file, or from standard input (-)."""
    num_samples: Size = 1
    """Number of samples, generated as one batch."""
    max_new_tokens: CountOrZero = 500
    """Length of each sample, in tokens."""
    temperature: NotNegative = 0.8
    """Below 1 more conservative, above 1 more random; 0 always picks the most probable token."""
    top_k: CountOrZero = 0
    """Sample only from the k most probable tokens; 0 allows all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the most probable tokens whose probabilities add up to this."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample only from tokens at least this fraction as probable as the most probable one."""
    stop: tuple[str, ...] = ()
    """End a sample before this text; \\n means a new line. May be given several times."""
    seed: Seed = 1337
    """Seed of the samples."""
    skip_unknown: bool = False
    """Leave out characters that are not in the model's vocabulary; otherwise they are an error."""
    interactive: bool = False
    """Ask for prompts in a loop and keep the conversation as context."""
    score: PathStr = ""
    """Instead of sampling, print the model's loss on this text file, on standard input (-), or on this dataset's
    validation split; NAME:train and NAME:test are its other splits."""
    novelty: str = ""
    """Instead of printing samples, print how much of them stands word for word in the training text of this dataset,
    and how much of its validation text does, which is normal for this text."""
    attention: str = ""
    """Instead of sampling, write the attention weights of this text, in every layer and head, to out; computed in
    float32 on the CPU."""
    out: PathStr = ""
    """File to write attention to: a page for a browser if it ends in .html, a figure for papers if it ends in .png
    (pip install matplotlib)."""
    data_dir: PathStr = "data"
    """Folder of the datasets, and of GPT-2's vocabulary for models that use it."""
    cache: bool = True
    """Cache keys and values between tokens: the same text, faster."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if there is one and more to write than a CPU does in seconds."""
    dtype: DType = "auto"
    """Precision of matrix products on a GPU; a CPU computes in float32. auto: bfloat16 where the
    hardware supports it, float16 on an older GPU, otherwise float32."""

    def conflicts(self) -> Iterator[str]:
        """Yield one line for each combination of values that is not allowed."""
        if self.prompt and self.prompt_file:
            yield "prompt and prompt_file contradict each other; choose one"
        if self.interactive and self.num_samples > 1:
            yield "interactive shows one sample at a time; leave num_samples out"
        if self.interactive and "-" in (self.prompt_file, self.score):
            yield "interactive reads standard input; pass the prompt with --prompt"
        modes = [name for name in ("attention", "score", "novelty", "interactive") if getattr(self, name)]
        if len(modes) > 1:
            yield f"{' and '.join(modes[:2])} contradict each other; choose one"
        if self.attention and not self.out:
            yield "attention needs a file to write: --out=attention.html, or attention.png"
        if self.out and not self.attention:
            yield 'out is for attention: --attention="TEXT"'
        if self.out and not self.out.lower().endswith((".html", ".png")):
            yield f"out = '{self.out}' must end in .html or .png"


RECORD_KINDS = {"": None, "lines": "\n", "documents": ""}
"""Names of kinds of records, and what separates them: nothing where each document is one, None without records."""


class PrepareSettings(Settings):
    """Settings of prepare.py"""

    name: str = ""
    """Name of the dataset. Default: the name of the recipe, or of the only file or folder."""
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"
    """char: one token per character; byte: one per UTF-8 byte; bpe: vocab_size BPE tokens, learned from the text; gpt2:
    GPT-2's 50,257 BPE tokens."""
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = 1024
    """Tokens of the bpe tokenizer: 256 bytes, merges, and one that separates documents."""
    vocabulary: PathStr = ""
    """Use the tokenizer of this run, checkpoint file or dataset folder, for train.py --init_from."""
    skip_unknown: bool = False
    """Drop characters that are not in that vocabulary; otherwise they are an error."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the text that is the validation split."""
    val: PathStr = ""
    """Text for validation: a file, folder or pattern, instead of a fraction of the text."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the text that is the test split, which only sample.py --score=NAME:test reads."""
    split: Literal["tail", "documents", "blocks"] = "tail"
    """What these fractions are: tail: the end of the text; documents: random files or records; blocks: random parts."""
    seed: Seed = 1337
    """Random seed of the split."""
    records: str = ""
    r"""The text is a list of records, such as names or recipes, which the model learns and writes one by one: lines,
    documents (files, or the texts of JSON, CSV or Parquet), or the text between them, such as '\n\n' or '%%'."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    newlines: Literal["keep", "lf"] = "keep"
    r"""lf: make every line end \n; otherwise \r\n and \r stay as they are."""
    normalize: Literal["none", "nfc"] = "none"
    """nfc: compose letters and accents to single characters where Unicode has them (NFC)."""
    deduplicate: Literal["none", "lines", "passages", "records"] = "none"
    """Drop repeated lines of at least 20 characters, passages (between empty lines) of at least 50, or records."""
    min_count: Count = 1
    """Replace characters that occur fewer than this many times by one symbol, U+FFFD."""
    report: bool = True
    """Look for problems in the text, and write report.html."""
    text_field: str = "text"
    """Field or column of the text in JSON, JSON Lines, CSV and Parquet files."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 0
    """Threads that encode. 0: one per core for bpe and gpt2, otherwise one, which is faster than most disks."""
    shard_tokens: Count = 100_000_000
    """Tokens in each shard file."""
    data_dir: PathStr = "data"
    """Folder of recipes and datasets."""
    overwrite: bool = False
    """Replace the dataset of that name."""

    def conflicts(self) -> Iterator[str]:
        """Yield one line for each combination of values that is not allowed."""
        if self.skip_unknown and not self.vocabulary:
            yield "skip_unknown needs a vocabulary: --vocabulary=RUN"
        if self.val_fraction + self.test_fraction >= 1:
            yield "val_fraction and test_fraction leave no text to train on; their sum must be less than 1"
        if self.val and (self.split != "tail" or {"val_fraction", "test_fraction"} & self.model_fields_set):
            yield "val names the validation text; leave out split, val_fraction and test_fraction"
        if self.records not in RECORD_KINDS and (kind := self.records.lower().rstrip("s") + "s") in RECORD_KINDS:
            yield f"records = '{self.records}': did you mean {kind}?"
        if "vocab_size" in self.model_fields_set and (self.tokenizer != "bpe" or self.vocabulary):
            yield "vocab_size is for a vocabulary that is learned: --tokenizer=bpe, without --vocabulary"
        if self.min_count > 1 and (self.tokenizer != "char" or self.vocabulary):
            yield "min_count is for a vocabulary that is learned from the text: --tokenizer=char, without --vocabulary"


class ConvertSettings(Settings):
    """Settings of glyphgpt.convert"""

    out: PathStr = ""
    """File or folder to write."""
    meta: PathStr = ""
    """nanoGPT's meta.pkl, for a character-level checkpoint."""
    name: SingleLine = ""
    """Name of the dataset, or title of the page; by default the folder's name."""
    int8: bool = False
    """Store the weights of a page as int8 instead of float16: half the size, and nearly the same loss."""
    data_dir: PathStr = "data"
    """Folder of the datasets."""
    overwrite: bool = False
    """Replace existing output."""


class PlotSettings(Settings):
    """Settings of glyphgpt.reports.plot"""

    out: PathStr = ""
    """PNG file to write; by default metrics.png in the run's folder."""


class TranslateSettings(Settings):
    """Settings of glyphgpt.inference.translate"""

    beam: Annotated[int, Field(ge=1, le=1000)] = 4
    """Beam width: hypotheses kept for each line. 1 is greedy decoding, which is faster."""
    batch_size: Size = 32
    """Lines of equal length translated at once."""
    reference: PathStr = ""
    """File of reference translations, line by line, to compute BLEU (pip install sacrebleu)."""
    out: PathStr = ""
    """File to write the translations to; by default they are printed."""
    skip_unknown: bool = False
    """Leave out characters that are not in the model's vocabulary; otherwise they are an error."""
    data_dir: PathStr = "data"
    """Folder of GPT-2's vocabulary, for models that use it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if there is one, otherwise the CPU."""
    dtype: DType = "auto"
    """Precision of matrix products on a GPU; a CPU decodes in float32."""


class ReportSettings(Settings):
    """Settings of glyphgpt.reports.run_report"""

    out: PathStr = ""
    """HTML file to write; by default report.html in the run's folder."""
