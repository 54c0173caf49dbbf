"""A board as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kdbench.board.document import Board, Table, facts_line
from kdbench.board.formats.lines import Columns, lines, visible

TEMPLATE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ board.title }}</title>
<style>
body { font-family: sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ccc; text-align: right; }
.text { text-align: left; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ board.title }}</h1>
<p>{{ facts }}</p>
{% for table in tables %}
{% if table.folded %}<details><summary>{{ table.title }}</summary>{% else %}<h2>{{ table.title }}</h2>{% endif %}
<div class="wide"><table>
<thead>
<tr>
{% for column in table.columns %}
<th class="{{ column.kind.value }}" title="{{ column.about }}">{{ column.heading }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for line in table.lines %}
<tr>
{% for words in line %}
<td class="{{ table.columns[loop.index0].kind.value }}">{{ words }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% if table.folded %}</details>{% endif %}
{% endfor %}
<ul>
{% for note in board.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
</body>
</html>
"""


@dataclass(frozen=True)
class _Shown:
    """A table as the template shows it."""

    title: str
    folded: bool
    columns: Columns
    lines: Sequence[Sequence[str]]

    @classmethod
    def of(cls, table: Table) -> "_Shown":
        columns = visible(table)
        return cls(table.full_title, table.folded, columns, lines(table, columns))


def html(board: Board) -> str:
    """The page. Every name and reason in it is escaped: they come from suites and from errors."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE)
    return template.render(board=board, facts=facts_line(board), tables=[_Shown.of(table) for table in board.tables])
