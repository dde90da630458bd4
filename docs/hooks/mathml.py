"""LaTeX to MathML, which browsers render by themselves: no script, no other host."""

import re
from functools import cache

from latex2mathml.converter import convert

#: Names that TeX sets apart from what follows them.
_FUNCTION = re.compile(r"(<mi>(?:log|exp|min|max|KL|Var)</mi>)(?=<m(?:i|sub|sup|row)>)")
_FENCE = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


@cache
def mathml(latex: str, *, block: bool) -> str:
    """One formula as HTML on one line, so that Markdown leaves it alone."""
    html = convert(" ".join(latex.split()), display="block" if block else "inline")
    html = _FUNCTION.sub(r'\1<mspace width="0.17em"/>', html.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', ""))
    # Within a span or a div: a line that starts with <math> would end Markdown's paragraph.
    return f'<div class="math">{html}</div>' if block else f'<span class="math">{html}</span>'


def fences(markdown: str) -> str:
    """A page with its ```math blocks, which GitHub renders too, as MathML."""
    return _FENCE.sub(lambda m: mathml(m[1], block=True), markdown)
