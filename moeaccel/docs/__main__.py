"""``python -m moeaccel.docs``: make the generated parts of all pages anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeaccel.docs import updated
from moeaccel.docs.markdown import ROOT

app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the pages.")] = ROOT / "docs",
) -> None:
    """Make the generated parts of all pages of a folder anew."""
    for page in sorted(folder.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = updated(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            typer.echo(f"{page} has changed")


if __name__ == "__main__":
    app()
