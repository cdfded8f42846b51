"""The parts of an HTML page that fetches nothing: document, sections, tables, and the text in them, escaped.

Its Content-Security-Policy forbids everything but pictures in data URIs and the one style sheet and the one script, which are
named by their hashes.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape

from fastmae.train.report import curves

_ROWS = 20  # of a table
_LONGEST = 300  # letters of a cell


def make_document(title: str, parts: Sequence[str], foot: str) -> str:
    """The whole page: ``parts`` are HTML, ``title`` and ``foot`` text."""
    policy = (f"default-src 'none'; img-src data:; style-src '{_hash(_STYLE)}'; script-src '{_hash(curves.SCRIPT)}'; "
              "base-uri 'none'; form-action 'none'")  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer>{escape_text(foot)}</footer>
<script>{curves.SCRIPT}</script>
</body>
</html>
"""


def make_section(name: str, title: str, *parts: str) -> str:
    """A section with a heading; ``parts`` are HTML."""
    return f'<section id="{name}" aria-labelledby="{name}-h">\n<h2 id="{name}-h">{title}</h2>\n{"".join(parts)}\n</section>'


def make_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, newest: bool = False, cap: int = _ROWS,
           numbers: bool = True) -> str:  # fmt: skip
    """An HTML table of at most ``cap`` rows, the first or the newest ones, and how many are left out; nothing without rows."""
    if not rows:
        return ""
    shown = rows[-cap:] if newest else rows[:cap]
    is_number = [numbers and all(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?|", row[i]) for row in shown) for i in range(len(head))]

    def line(cells: Iterable[str], tag: str) -> str:
        made = (f'<{tag}{" class=n" if n else " class=short" if len(cell) <= 20 else ""}'
                f'{" scope=col" if tag == "th" else ""}>{escape_text(cell)}</{tag}>'
                for cell, n in zip(cells, is_number, strict=True))  # fmt: skip
        return f"<tr>{''.join(made)}</tr>"

    left = len(rows) - len(shown)
    note = f'<p class="soft">{left:,} {"earlier" if newest else "more"} not shown.</p>' if left else ""
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in shown)}</tbody></table>{note}</div>"
    )


def escape_text(value: str) -> str:
    """Text for HTML: escaped, without control characters or halves of surrogate pairs, and not endless."""
    named = "".join(f"\\u{ord(c):04x}" if "\udc80" <= c <= "\udcff" else c for c in value[: _LONGEST + 1])  # of no UTF-8
    clean = "".join(c if c.isprintable() else " " for c in named)
    return escape(clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}…")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


_STYLE = f"""
:root {{ --page: #fff; --panel: #f6f7f9; --text: #1b1f24; --soft: #57606a; --rule: #d8dee4; --accent: #0b62c4; --bad: #c4320a;
  --good: #1a7f37; color-scheme: light; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --page: #0e1116; --panel: #171b22; --text: #e6e9ee; --soft: #9aa4b1; --rule: #2d343e; --accent: #6cb0ff;
    --bad: #ff8a65; --good: #4cc26a; color-scheme: dark; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }}
main, footer {{ max-width: 80rem; margin: 0 auto; padding: 0 1.25rem; }}
h1 {{ margin: 0 0 .5rem; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--rule); font-size: 1.2rem; }}
p {{ margin: .25rem 0 .75rem; overflow-wrap: anywhere; }}
header {{ padding-top: 1.5rem; }}
header p.soft {{ margin: 0; }}
footer {{ padding-block: 2rem; color: var(--soft); font-size: .85rem; }}
.soft {{ color: var(--soft); font-size: .9rem; }}
.state {{ margin-right: .4rem; padding: .1rem .6rem; border: 1px solid; border-radius: 1rem; font-weight: 600; }}
.running, .finished {{ color: var(--good); }}
.diverged, .silent {{ color: var(--bad); }}
progress {{ width: 100%; height: .6rem; accent-color: var(--accent); }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }}
dl div {{ padding: .6rem .8rem; border-radius: .4rem; background: var(--panel); }}
dt {{ color: var(--soft); font-size: .85rem; }}
dd small {{ display: block; color: var(--soft); font-size: .8rem; font-weight: 400; white-space: nowrap; }}
dd {{ margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem 2rem; }}
.curves #loss {{ grid-column: 1 / -1; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem; }}
.pictures img {{ display: block; width: 100%; height: auto; border-radius: .3rem; background: #fff; }}
.missing {{ padding: 1rem; background: var(--panel); color: var(--soft); }}
.columns {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }}
.table {{ overflow-x: auto; margin: 1rem 0; }}
table {{ width: 100%; border-collapse: collapse; font-size: .875rem; }}
caption {{ padding-bottom: .25rem; text-align: left; font-weight: 600; }}
th, td {{ padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  unicode-bidi: isolate; }}
td {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
th {{ color: var(--soft); font-weight: 500; }}
td.short, td.n {{ white-space: nowrap; }}
td:not(.short, .n) {{ min-width: 11rem; }}
.n {{ text-align: right; }}
{curves.STYLE}
@media print {{
  body {{ font-size: 10pt; }}
  figure, tr, dl div {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  .table {{ overflow: visible; }}
}}
"""
