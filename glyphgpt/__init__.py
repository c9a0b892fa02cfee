"""glyphgpt trains small GPTs on your own text. This is its Python API.

    import glyphgpt

    model = glyphgpt.load("out/quick")
    print(model.generate("ROMEO:", max_new_tokens=200, seed=1))

docs/python.md explains it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glyphgpt.inference.api import Model, TextScore, load

__all__ = ["Model", "TextScore", "load"]


def __getattr__(name: str) -> Any:
    """Import the API when it is used, because the scripts, which also import this package, start faster without it."""
    if name not in __all__:
        raise AttributeError(f"module 'glyphgpt' has no attribute {name!r}")
    from glyphgpt.inference import api  # noqa: PLC0415

    return getattr(api, name)
