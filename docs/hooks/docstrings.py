"""Docstrings for the API reference: reST formulas become MathML, names of the API become links."""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))  # extensions are loaded by path, without their folder
from mathml import mathml

_BLOCK = re.compile(r"^([ ]*)\.\. math::((?:.+\n?)(?:[ ]+.+\n?)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_NAME = re.compile(r"(?<![`\[])`([A-Za-z_]+)(?:\.([a-z_]+))?(\(\))?`(?!`)")


class Docstrings(griffe.Extension):
    """Turns the docstrings' conventions into what the reference's Markdown and parser expect."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = set(pkg.exports or [])
        for name in map(str, public):  # a function in a module of its own name: the package has the function
            module = pkg.members.get(name)
            if module is not None and module.is_module and name in module.members:
                pkg.members[name] = griffe.Alias(name, module.members[name], parent=pkg)
        self._walk(pkg, pkg, {str(name) for name in public})

    def _walk(self, package: griffe.Module, thing: Any, public: set[str]) -> None:
        for member in list(thing.members.values()):
            if member.is_alias:
                continue
            if member.docstring is not None:
                owner = member if member.is_class else member.parent
                member.docstring.value = _prepare(member.docstring.value, package, owner, public)
            if member.is_module or member.is_class:
                self._walk(package, member, public)


def _prepare(text: str, package: griffe.Module, owner: Any, public: set[str]) -> str:
    text = _BLOCK.sub(lambda m: f"{m[1]}{mathml(m[2], block=True)}\n", text)
    text = _INLINE.sub(lambda m: mathml(m[1], block=False), text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^Source: ", "**Source:** ", text, flags=re.MULTILINE)

    def link(match: re.Match[str]) -> str:
        name, member = match[1], match[2]
        if name in public:
            target = f"{package.path}.{name}" + (f".{member}" if member else "")
        elif not member and _shows(owner, name, public):
            target = f"{package.path}.{owner.name}.{name}"
        else:
            return match[0]
        return f"[{match[0]}][{target}]"

    return _NAME.sub(link, text)


def _shows(owner: Any, name: str, public: set[str]) -> bool:
    """Whether the reference of a class has a place for this member."""
    if owner is None or not owner.is_class or owner.name not in public or name not in owner.members:
        return False
    return not name.startswith("_") and owner.members[name].docstring is not None
