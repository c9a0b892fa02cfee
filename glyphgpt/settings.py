"""Every setting of the three scripts, declared once: its type, bounds, default and meaning.

The class a setting stands in is its heading in `--help`; the line below a setting is its help.
`glyphgpt/cli.py` turns TOML files and flags into these classes.
"""

import os.path
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Size = Annotated[int, Field(ge=1, le=10**6)]  # beyond any machine, and small enough that products stay numbers
Count = Annotated[int, Field(ge=1, le=10**12)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SingleLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
PathStr = Annotated[SingleLine, AfterValidator(os.path.expanduser)]
"""A file or folder; ~ is the home folder, which shells expand neither in quotes nor after --key=."""


PATHS = ("data_dir", "out_dir", "init_from")
"""Settings of train.py that are paths: absolute in a run's config.toml, and left out of what is passed on."""


class Settings(BaseModel):
    """Typed, frozen settings that know nothing of where their values came from."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def conflicts(self) -> Iterator[str]:
        """Say, a line each, which values do not go together."""
        yield from ()


class Files(Settings):
    """Data and results"""

    dataset: PathStr = "shakespeare_char"
    """Name of a prepared dataset in data_dir, or the path of its folder."""
    data_dir: PathStr = "data"
    """Folder of the data sets."""
    out_dir: PathStr = "out/run"
    """Folder of this run: checkpoints, metrics and settings."""
    init_from: PathStr = ""
    """A run, a checkpoint, or a Hugging Face GPT-2's folder, whose weights and network to begin with; block_size may
    be less, dropout another."""


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
    """Share of activations dropped while training; 0.1 to 0.3 where a text is seen many times."""
    bias: bool = False
    """Biases in the linear layers and LayerNorms, as GPT-2 has them."""
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How positions are told: a learned table (GPT-2), fixed waves (Attention is all you need) or rotation of
    queries and keys (RoFormer)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    activation: Literal["gelu", "gelu_erf", "relu2"] = "gelu"
    """The MLP's non-linearity: GPT-2's GELU, by way of tanh; nanoGPT's, by way of erf; or ReLU squared (Primer)."""
    qk_norm: bool = False
    """Normalise queries and keys, which allows higher learning rates."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too."""
    ngram: Size = 1
    """Above 1: embed the last 2, 3, ... n tokens together too, from hashed tables. Much memory, hardly any
    computation, and far fewer steps to a good loss."""
    ngram_rows: Annotated[int, Field(ge=1, le=10**9)] = 16384
    """Rows of each of these tables."""
    token_shift: bool = False
    """Mix into each token's embedding a learned share of the one before."""
    init: Literal["gpt2", "zero"] = "gpt2"
    """Weights to begin with: GPT-2's, or zero for all that writes to the residual stream or the logits."""


class Optimization(Settings):
    """Optimization"""

    batch_size: Size = 12
    """Sequences that go through the network at once; lower it when memory runs out."""
    gradient_accumulation_steps: Size = 1
    """Batches summed into one update: an update sees batch_size x this many sequences, however many
    processes share them."""
    max_steps: CountOrZero = 2000
    """Number of updates."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for every weight, or Muon for the blocks' matrices and AdamW for the rest."""
    learning_rate: Positive = 1e-3
    """Highest learning rate."""
    min_lr: NotNegative = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: CountOrZero = 100
    """Steps over which the learning rate rises to its highest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from learning_rate after the warm-up to min_lr at max_steps."""
    weight_decay: NotNegative = 0.1
    """Weight decay; on matrices and embeddings only."""
    ngram_weight_decay: NotNegative = 0.1
    """That of the n-gram tables: far more than of the rest where a text is seen more than once or twice."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Fraction = 0.99
    """AdamW's decay of the mean squared gradient."""
    grad_clip: NotNegative = 1.0
    """Gradients are scaled down to at most this norm; 0 leaves them alone."""
    seed: Seed = 1337
    """Decides the initial weights, the order of the data and the dropout."""


class Evaluation(Settings):
    """Evaluation, logs and checkpoints"""

    eval_every: Count = 250
    """Steps between evaluations on the validation split; each one also saves."""
    eval_tokens: CountOrZero = 0
    """Evaluate on the first so many validation tokens; 0 takes all."""
    patience: CountOrZero = 0
    """Stop after so many evaluations in a row without a better loss; 0 never stops early."""
    sample_tokens: CountOrZero = 120
    """Tokens of sample text shown at each evaluation."""
    log_every: Count = 10
    """Steps between lines of training loss in metrics.jsonl."""
    save_every: CountOrZero = 0
    """Save last.safetensors every so many steps too; 0 saves at evaluations only."""
    plot: bool = True
    """Plot the run into out_dir/metrics.png at its end, if matplotlib is installed (pip install matplotlib)."""
    report: bool = True
    """Tell the run in out_dir/report.html at its end: curves, samples, settings, for any browser."""
    tensorboard: bool = False
    """Write TensorBoard logs to out_dir (pip install tensorboard)."""
    wandb: bool = False
    """Log to Weights & Biases (pip install wandb)."""
    wandb_project: SingleLine = "glyphgpt"
    """Project to log to there."""


class Hardware(Settings):
    """The machine"""

    device: SingleLine = "auto"
    """cpu, cuda, cuda:1, mps, or auto: the fastest one here."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products; weights stay float32. auto: bfloat16 on a GPU or CPU that has it, float16 on an
    older GPU, else float32."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the model, which takes up to half a minute before the first step. auto: on CUDA only."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) hold the model: each all of it, or each a shard of every weight, for models that
    are too large for one GPU."""
    activation_checkpointing: bool = False
    """Compute each block's activations anew for the backward pass: far less memory, about a third more time."""


class Mode(Settings):
    """What to do (on the command line only)"""

    resume: bool = False
    """Continue from out_dir/last.safetensors, exactly. `train.py --resume FOLDER` resumes the run in that folder."""
    overwrite: bool = False
    """Replace the run that out_dir holds."""
    eval_only: bool = False
    """Evaluate out_dir/best.safetensors, and stop."""
    summary: bool = False
    """Print a summary of the model, its shapes, parameters and operations, and exit."""


class TrainSettings(Mode, Hardware, Evaluation, Optimization, Network, Files):  # pydantic takes the last first
    """Settings of train.py."""

    def conflicts(self) -> Iterator[str]:
        """Say, a line each, which values do not go together."""
        if self.n_embd % self.n_head:
            yield f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}"
        elif self.position == "rotary" and self.n_embd // self.n_head % 2:
            yield f"position = 'rotary' needs an even head size; n_embd / n_head is {self.n_embd // self.n_head}"
        if self.position == "sinusoidal" and self.n_embd % 2:
            yield f"position = 'sinusoidal' needs an even n_embd, not {self.n_embd}"
        if self.init == "zero" and self.tie_embeddings:
            yield "init = 'zero' begins with a head of zeros, which the embedding cannot be; add tie_embeddings = false"
        if self.min_lr > self.learning_rate:
            yield f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}"
        if self.init_from == "resume":
            yield "init_from = 'resume' is nanoGPT's way; say --resume here"
        if self.eval_tokens == 1:
            yield "eval_tokens = 1 leaves nothing to predict; take at least 2, or 0 for all"
        if self.resume and self.overwrite:
            yield "resume and overwrite contradict each other; choose one"


class SampleSettings(Settings):
    """Settings of sample.py"""

    prompt: str = ""
    """Text to go on from; when empty, a new line."""
    prompt_file: PathStr = ""
    """Read the prompt from this UTF-8 file; - is standard input."""
    num_samples: Size = 1
    """Samples to draw, all in one batch."""
    max_new_tokens: CountOrZero = 500
    """Length of each sample."""
    temperature: NotNegative = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: CountOrZero = 0
    """Draw from the k likeliest tokens only; 0 allows all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    stop: tuple[str, ...] = ()
    """End a sample before this text, in which \\n stands for a new line; may be given several times."""
    seed: Seed = 1337
    """Same seed, same samples."""
    skip_unknown: bool = False
    """Leave out characters that are not in the model's vocabulary; otherwise they are an error."""
    interactive: bool = False
    """Ask for prompts in a loop; the text so far is kept as context."""
    score: PathStr = ""
    """Instead of sampling, tell the loss of this text file, or of this data set's validation split, under the model;
    - is standard input."""
    attention: str = ""
    """Instead of sampling, write the attention weights of this text, in every layer and head, to out; computed in
    float32 on the CPU."""
    out: PathStr = ""
    """File to write attention to: a page for a browser if it ends in .html, a figure for papers if it ends in .png
    (pip install matplotlib)."""
    data_dir: PathStr = "data"
    """Folder of data sets, and of GPT-2's vocabulary for models that use it."""
    cache: bool = True
    """Keep keys and values between tokens: the same text, sooner."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products on a GPU, and of --score; a CPU samples in float32. auto: bfloat16 where there is
    such hardware, float16 on an older GPU, else float32."""

    def conflicts(self) -> Iterator[str]:
        """Say, a line each, which values do not go together."""
        if self.prompt and self.prompt_file:
            yield "prompt and prompt_file contradict each other; choose one"
        if self.interactive and self.num_samples > 1:
            yield "interactive shows one sample at a time; leave num_samples out"
        if self.interactive and "-" in (self.prompt_file, self.score):
            yield "interactive reads standard input itself; give the prompt another way"
        if self.score and self.interactive:
            yield "score and interactive contradict each other; choose one"
        if self.attention and (self.score or self.interactive):
            yield f"attention and {'score' if self.score else 'interactive'} contradict each other; choose one"
        if self.attention and not self.out:
            yield "attention needs a file to write: --out=attention.html, or attention.png"
        if self.out and not self.attention:
            yield 'out is for attention: --attention="TEXT"'
        if self.out and not self.out.lower().endswith((".html", ".png")):
            yield f"out = '{self.out}' must end in .html or .png"


class PrepareSettings(Settings):
    """Settings of prepare.py"""

    name: str = ""
    """Name of the dataset. Default: the name of the recipe, or of the only file or folder."""
    tokenizer: Literal["char", "byte", "gpt2"] = "char"
    """char: one token per character; byte: one per UTF-8 byte; gpt2: GPT-2's 50,257 BPE tokens."""
    vocabulary: PathStr = ""
    """Use the tokenizer of this run, checkpoint file or dataset folder, for train.py --init_from."""
    skip_unknown: bool = False
    """Drop characters that are not in that vocabulary; otherwise they are an error."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the text, at its end, that is the validation split."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    text_field: str = "text"
    """Field or column of the text in JSON, JSON Lines, CSV and Parquet files."""
    workers: Annotated[int, Field(ge=0, le=1000)] = 0
    """Threads that encode. 0: one per core for gpt2, otherwise one, which is faster than most disks."""
    shard_tokens: Count = 100_000_000
    """Tokens in each shard file."""
    data_dir: PathStr = "data"
    """Folder of recipes and datasets."""
    overwrite: bool = False
    """Replace the dataset of that name."""

    def conflicts(self) -> Iterator[str]:
        """Yield a line for each conflict between values."""
        if self.skip_unknown and not self.vocabulary:
            yield "skip_unknown needs a vocabulary: --vocabulary=RUN"


class ConvertSettings(Settings):
    """Settings of glyphgpt.convert"""

    out: PathStr = ""
    """File or folder to write."""
    meta: PathStr = ""
    """nanoGPT's meta.pkl, for a checkpoint of characters."""
    name: SingleLine = ""
    """Name of the data set; the folder's own when left out."""
    data_dir: PathStr = "data"
    """Folder of the data sets."""
    overwrite: bool = False
    """Replace what is there."""


class PlotSettings(Settings):
    """Settings of glyphgpt.reports.plot"""

    out: PathStr = ""
    """PNG file to draw; metrics.png in the run's folder when left out."""


class TranslateSettings(Settings):
    """Settings of glyphgpt.inference.translate"""

    beam: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many ways to translate a line are kept in view; 1 always takes the likeliest token, which is faster."""
    batch_size: Size = 32
    """Lines translated at once, of those that are equally long."""
    reference: PathStr = ""
    """File of right translations, line by line, to tell the BLEU of ours (pip install sacrebleu)."""
    out: PathStr = ""
    """File to write the translations to; printed when left out."""
    skip_unknown: bool = False
    """Leave out characters that are not in the model's vocabulary; otherwise they are an error."""
    data_dir: PathStr = "data"
    """Folder of GPT-2's vocabulary, for models that use it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products on a GPU; a CPU decodes in float32."""


class ReportSettings(Settings):
    """Settings of glyphgpt.reports.run_report"""

    out: PathStr = ""
    """HTML file to write; report.html in the run's folder when left out."""
