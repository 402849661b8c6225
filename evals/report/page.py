"""A page of headings, paragraphs, tables and figures, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
from typing import Any

import jinja2

# jinja2 puts everything into HTML safely; figures lie inside the file, so that it can be sent on alone.
HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html><meta charset="utf-8"><title>Evaluation</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: left }
th { background: #f3f3f3 }
img { max-width: 100% }
</style>
<h1>Evaluation</h1>
{% for kind, value in parts %}
{% if kind == "head" %}
<h2>{{ value }}</h2>
{% elif kind == "text" %}
<p>{{ value }}</p>
{% elif kind == "figure" %}
<figure><img alt="{{ value[2] }}" src="data:image/png;base64,{{ base64(value[1]) }}"><figcaption>{{ value[2] }}</figcaption></figure>
{% else %}
<table><tr>{% for column in value[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in value[1] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% endfor %}
""")


class Page:
    """Collects headings, paragraphs, tables and figures in their order; renders Markdown and HTML."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, Any]] = []  # (head or text, words), (table, (columns, rows)), (figure, (name, png, caption))

    def head(self, text: str) -> None:
        """A heading of the second level."""
        self.parts.append(("head", text))

    def say(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(("text", text))

    def table(self, columns: list[str], rows: list[list[Any]]) -> None:
        """A table, its values written by `cell`; nothing where there are no rows."""
        if rows:
            self.parts.append(("table", (columns, [[cell(c) for c in row] for row in rows])))

    def figure(self, name: str, png: bytes | None, caption: str) -> None:
        """A plot that Markdown finds in plots/NAME.png; nothing where there is none."""
        if png:
            self.parts.append(("figure", (name, png, caption)))

    def figures(self) -> dict[str, bytes]:
        """The plots by name, as PNG."""
        return {value[0]: value[1] for kind, value in self.parts if kind == "figure"}

    def markdown(self) -> str:
        """The page as Markdown, under the heading Evaluation."""
        lines = []
        for kind, value in self.parts:
            if kind == "head":
                lines += [f"## {value}", ""]
            elif kind == "text":
                lines += [value, ""]
            elif kind == "figure":
                lines += [f"![{value[2]}](plots/{value[0]}.png)", ""]
            else:
                lines += [markdown_table(*value), ""]
        return "# Evaluation\n\n" + "\n".join(lines)

    def html(self) -> str:
        """The page as one HTML file, plots inside."""
        return HTML.render(parts=self.parts, base64=lambda png: base64.b64encode(png).decode())


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, without a line's end after it."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows])


def cell(value: Any) -> str:
    """A value as the tables show it: '-' for None, floats with four digits, whole numbers with commas."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
