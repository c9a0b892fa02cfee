"""Write docs/settings.md, the reference of every setting, from the declarations in glyphgpt/settings.py.

python docs/make_settings.py
"""

from collections.abc import Iterator
from pathlib import Path

from glyphgpt.cli import bounds, default_text, groups, metavar
from glyphgpt.settings import PrepareSettings, SampleSettings, Settings, TrainSettings

TARGET = Path(__file__).with_name("settings.md")


def page() -> str:
    """Return the text of the page."""
    lines = [
        "# Every setting",
        "",
        "These are the tables of `--help`, written by `python docs/make_settings.py`. A setting has the same name in a",
        "TOML file (`batch_size = 32`) and on the command line (`--batch_size=32`).",
    ]
    for settings_class in (TrainSettings, PrepareSettings, SampleSettings):
        lines += ["", f"## {settings_class.__name__.removesuffix('Settings').lower()}.py"]
        for heading, rows in tables(settings_class):
            lines += ["", heading, "", "| setting | takes | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def tables(settings_class: type[Settings]) -> Iterator[tuple[str, list[str]]]:
    """Yield the heading and the rows of each group of settings."""
    for heading, fields in groups(settings_class):
        rows = []
        for key, field in fields.items():
            takes = ", ".join([metavar(field.annotation).replace("|", " "), *bounds(field)])
            default = f"`{default_text(field)}`" if field.default not in ("", ()) else ""
            rows.append(f"| `{key}` | {takes} | {default} | {' '.join((field.description or '').split())} |")
        yield heading.rstrip("."), rows


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
