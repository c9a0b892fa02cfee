"""Export to one HTML file that writes text in any browser, without a network."""

from pathlib import Path

from glyphgpt.convert.common import output_path
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.reports.model_page import write_model_page
from glyphgpt.settings import ConvertSettings


def export_page(path: Path, settings: ConvertSettings) -> str:
    """Export a checkpoint, or a run's best one, to a page; return a message for the user.

    Raises:
        UsageError: The output has no path, or exists and may not be replaced.
        UserError: The checkpoint cannot be read, or the page cannot be written.
    """
    out = output_path(settings, "model.html")
    checkpoint, tokenizer = open_checkpoint(path, Path(settings.data_dir))
    size = write_model_page(out, checkpoint, tokenizer, title=settings.name, int8=settings.int8)
    return f"{out}: {size / 1e6:.1f} MB; open it in any browser, or send it to a friend"
