"""Write docs/settings.md, every setting of the three scripts, from where they are declared.

python docs/make_settings.py
"""

from collections.abc import Iterator
from pathlib import Path

from glyphgpt.cli import bounds, default_text, groups, metavar
from glyphgpt.settings import PrepareSettings, SampleSettings, Settings, TrainSettings

TARGET = Path(__file__).with_name("settings.md")


def page() -> str:
    """Return the whole page."""
    lines = [
        "# Every setting",
        "",
        "The same tables as `--help`, made from the code by `python docs/make_settings.py`. A setting is spelled alike",
        "in a TOML file (`batch_size = 32`) and on the command line (`--batch_size=32`).",
    ]
    for settings_class in (TrainSettings, PrepareSettings, SampleSettings):
        lines += ["", f"## {settings_class.__name__.removesuffix('Settings').lower()}.py"]
        for heading, rows in tables(settings_class):
            lines += ["", heading, "", "| setting | takes | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def tables(settings_class: type[Settings]) -> Iterator[tuple[str, list[str]]]:
    """Yield each group's heading with its rows."""
    for heading, fields in groups(settings_class):
        rows = []
        for key, field in fields.items():
            takes = ", ".join([metavar(field.annotation).replace("|", " "), *bounds(field)])
            default = f"`{default_text(field)}`" if field.default not in ("", ()) else ""
            rows.append(f"| `{key}` | {takes} | {default} | {' '.join((field.description or '').split())} |")
        yield heading.rstrip("."), rows


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
