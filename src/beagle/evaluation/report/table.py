"""A table as data, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WORDS = ("set", "category", "mode", "question")  # columns that stand at the left of a terminal's table


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: may be empty.
        rows: a text for each column.
        note: what a reader must know, below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        title = f"**{self.title}**\n\n" if self.title else ""
        return f"{title}{text}\n" + (f"\n{self.note}\n" if self.note else "")

    def rich(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in self.header:
            table.add_column(name, justify="left" if name in WORDS else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        if self.note:
            table.caption, table.caption_justify = self.note, "left"
        return table
