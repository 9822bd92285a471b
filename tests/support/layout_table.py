"""The tables of files.md and other-libraries.md: `python -m layout_table` here prints them anew."""

import tempfile
from pathlib import Path

from encoded_folders import CASES, EIGHT_BITS, UP

from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.layouts import LAYOUTS
from wush_jax.models.encodings import open_folder


def layouts():
    """What is read and written, from the registry."""
    yield "| layout | read | written | files of |"
    yield "|---|---|---|---|"
    for layout in LAYOUTS.values():
        written = "no" if layout.write is None else "yes"
        yield f"| `{layout.name}` | yes | {written} | {layout.written_by} |"


def encodings(work):
    """What becomes of each kind of weight, from folders that the tests' writers wrote."""
    yield "| layout | weights in the files | here |"
    yield "|---|---|---|"
    seen = {}
    for number, (writer, options) in enumerate({**CASES, **EIGHT_BITS}.values()):
        folder, _ = writer(work / str(number), **options)
        found = interchange.inspect_folder(folder)
        up = next(layer for layer in found.layers if layer.name == UP)
        kept = "plain weights" if up.format.endswith(" (decoded)") else f"packed, {up.format}"
        stored = open_folder(folder).encoded[f"{UP}.weight"].said
        seen.setdefault(f"| `{found.layout}` | {stored} | {kept} |")
    yield from sorted(seen)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*layouts(), "", *encodings(Path(folder)), sep="\n")
