"""`init_from`: start a run from the weights of another model."""

from pathlib import Path
from typing import TYPE_CHECKING

from glyphgpt.checkpoint import find_checkpoint, load_checkpoint
from glyphgpt.convert import from_huggingface
from glyphgpt.data.dataset import Dataset
from glyphgpt.errors import UsageError
from glyphgpt.files import LAST
from glyphgpt.settings import Network, TrainSettings
from glyphgpt.training.evaluation import check_vocabulary
from glyphgpt.training.torch_state import build_model

if TYPE_CHECKING:
    from model import GPT

NANOGPT_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # nanoGPT's init_from downloads these


def load_init_model(settings: TrainSettings, dataset: Dataset) -> tuple[TrainSettings, "GPT | None"]:
    """Return the settings with the network of the model that `init_from` names, and that model.

    Without `init_from`, return the settings unchanged and None. For a resumed run, return the settings with the network
    of its last checkpoint and None; its weights are loaded later.

    Raises:
        UsageError: The settings contradict that model's network, or name a model as nanoGPT does.
        UserError: The model cannot be read, or its vocabulary is not the dataset's.
    """
    if settings.init_from in NANOGPT_MODELS and not Path(settings.init_from).exists():
        raise UsageError(
            f"init_from = '{settings.init_from}' is nanoGPT's; here it is a folder with config.json and "
            "model.safetensors: download them from Hugging Face (hf download "
            f"openai-community/{settings.init_from} --local-dir FOLDER), then --init_from=FOLDER"
        )
    last = Path(settings.out_dir) / LAST
    if not settings.init_from or (settings.resume and not last.exists()):
        return settings, None
    path = last if settings.resume else Path(settings.init_from)
    if from_huggingface.is_huggingface_model(path):
        checkpoint = from_huggingface.read_model(path, Path(settings.data_dir))
    else:
        checkpoint = load_checkpoint(find_checkpoint(path), with_optimizer=False)
    check_vocabulary(checkpoint, dataset)
    network = checkpoint.config.model_dump(include=set(Network.model_fields) - {"dropout"})
    if "block_size" in settings.model_fields_set and settings.block_size < network["block_size"]:
        network["block_size"] = settings.block_size
    for name in settings.model_fields_set & network.keys():
        if getattr(settings, name) != network[name]:
            raise UsageError(
                f"{name} = {getattr(settings, name)} differs from {network[name]} in {checkpoint.path}; leave it out"
            )
    return settings.model_copy(update=network), None if settings.resume else build_model(checkpoint)
