"""HTML templates, and a function that fills one with data. The pages are self-contained: they load nothing."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

INCLUDE = re.compile(r"/\* include (\S+) \*/")
"""A line of a template that stands for the content of a file."""


def read(name: str) -> str:
    """Return the content of a file in this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def render(name: str, data: dict[str, Any]) -> str:
    """Return the page of the template `name`, with the files that it includes, and its data as JSON.

    Hostile text in the data is harmless: the JSON contains no "<", so that it cannot end its script element, and a
    Content-Security-Policy with the hashes of the template's own style and script forbids all others, and all loading.
    """
    page = INCLUDE.sub(lambda line: read(line[1]), read(name))
    for tag in ("style", "script"):
        source = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        page = page.replace(f"{tag.upper()}-HASH", f"sha256-{digest}")
    return page.replace("PAGE-DATA", json.dumps(data, allow_nan=False).replace("<", r"\u003c"))
