"""Pages for a browser that hold all they need: a template of this folder, filled with data."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any


def render(name: str, data: dict[str, Any]) -> str:
    """Return the page `name` with its data.

    The data stand in it as JSON in which nothing ends the script. A Content-Security-Policy lets the browser run and
    apply what has the hashes that stand in it, which are the template's own, and load nothing.
    """
    page = Path(__file__).with_name(name).read_text(encoding="utf-8")
    for element in ("style", "script"):
        source = page.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        page = page.replace(f"HASH-OF-{element.upper()}", f"sha256-{digest}")
    return page.replace("DATA-OF-PAGE", json.dumps(data, allow_nan=False).replace("<", r"\u003c"))
