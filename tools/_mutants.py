# SPDX-License-Identifier: Apache-2.0
"""What tools/mutate.py runs: one-line faults, drawn from a seed.

A mutant is drawn as a file, uniformly among the files of its kind, then a place in it, uniformly: an operator for its
neighbour, a constant one up, a comparison at its edge, a condition turned round. Comments, strings, declarations of
types and assertions hold no place. The list depends on the sources and the seed alone; nothing that was drawn is
dropped. What is drawn is what has the smallest hash, so that a change of the sources draws few others: a line that
moves keeps its mutant, and so do the places beside a new one, nearly always.
"""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 13772
COUNTS = {"python": 26, "cpu": 20, "cuda": 16}
FILES = {
    "python": ("groupmamba_ext/ops/*.py", "groupmamba_ext/*.py", "python/groupmamba/layers/*.py"),
    "cpu": ("csrc/cpu/*", "csrc/ops/*_cpu.cpp"),
    "cuda": ("csrc/cuda/**/*", "csrc/ops/*_cuda.cpp", "csrc/ops/layer/*", "csrc/host/*"),
}
# No kernels, ops or layers: loading, command lines, versions, the reference (which is the truth), launch tables.
LEFT_OUT = re.compile(r"__init__|_version|_command|_load|_explain|selftest|reference|\.md$|\.svg$|launch\.h$|args\.h$")


@dataclass
class Mutant:
    """A file with another line in place of one of its own."""

    kind: str
    file: str
    number: int  # of the line, from 1
    line: str
    mutated: str
    what: str
    repeat: int = 0  # of the same change of an equal line, in the order of the file

    @property
    def key(self) -> str:
        """Where it is, for people."""
        return f"{self.file}:{self.number}: {self.what}"

    @property
    def identity(self) -> str:
        """What it is, wherever its line has moved."""
        again = f" ({self.repeat + 1})" if self.repeat else ""
        return f"{self.file}: {self.line.strip()} => {self.mutated.strip()}{again}"

    def apply(self, root: Path) -> None:
        self._replace(root, self.line, self.mutated)

    def undo(self, root: Path) -> None:
        self._replace(root, self.mutated, self.line)

    def _replace(self, root: Path, old: str, new: str) -> None:
        path = root / self.file
        lines = path.read_text().splitlines(keepends=True)
        assert lines[self.number - 1].rstrip("\n") == old, f"{self.file} is another than was drawn from"
        lines[self.number - 1] = new + "\n"
        path.write_text("".join(lines))


SWAPS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "+=": "-=", "-=": "+=", "*=": "+=", "&&": "||", "||": "&&", "<<": ">>", ">>": "<<",
    "and": "or", "or": "and", "min": "max", "max": "min", "true": "false", "false": "true", "True": "False",
    "False": "True", "not": "", "!": "", "is": "is not", "any": "all", "all": "any",
}  # fmt: skip
NUMBER = re.compile(r"\d+|\d*\.\d+f?|\d+\.\d*f?|\de-\d+f?")
CPP_TOKEN = re.compile(
    r"//.*|/\*.*?\*/|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*|\d[\w.]*|"
    r"<<=|>>=|<=|>=|==|!=|&&|\|\||<<|>>|->|\+\+|--|[-+*/%]=|::|\S"
)
# Lines without a place: preprocessor, declarations (whose < and * are no operators), assertions, messages.
CPP_NO_PLACE = re.compile(
    r"^\s*(#|//|\*|using |namespace |template|static_assert|struct |class |friend |typedef |extern |GM_CHECK|STD_TORCH|"
    r"check\w*\(|m\.|asm|\")|__launch_bounds__|static_cast<[^>]*$|std::to_string|reinterpret_cast"
)
PYTHON_NO_PLACE = re.compile(r"^\s*(import |from |@|raise |assert |class |def .*:$|\)? *->|__all__|warnings)")


def mutate_number(text: str) -> str | None:
    """The next number, in the form of this one."""
    suffix = text[-1] if text[-1] in "fuUlL" and not text.startswith("0x") else ""
    body = text.removesuffix(suffix)
    if re.fullmatch(r"\d+", body):
        return f"{int(body) + 1}{suffix}"
    try:
        return f"{2 * float(body)!r}{suffix}" if float(body) else f"1.0{suffix}"
    except ValueError:
        return None


def python_places(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(line, column, end, replacement) of each place of a Python file."""
    lines = text.splitlines()
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    depth_def = 0  # inside the parentheses of a signature: annotations and defaults
    in_def = False
    for i, token in enumerate(tokens):
        if token.type == tokenize.NAME and token.string == "def":
            in_def, depth_def = True, 0
        if in_def and token.type == tokenize.OP:
            depth_def += token.string in "([{"
            depth_def -= token.string in ")]}"
            if token.string == ":" and depth_def == 0:
                in_def = False
        line = lines[token.start[0] - 1] if token.start[0] <= len(lines) else ""
        if in_def or token.start[0] != token.end[0] or PYTHON_NO_PLACE.match(line):
            continue
        if re.match(r"^\s*\w+(\.\w+)*: [A-Z]?\w+", line) and "=" not in line:
            continue  # an annotation
        before = tokens[i - 1].string if i else ""
        replacement = None
        if token.type == tokenize.OP or (token.type == tokenize.NAME and token.string in SWAPS):
            if token.string in ("-", "+", "*") and (
                before in "=([,:{" or before in ("return", "in", "else", "*", "**", "if")
            ):
                if token.string != "-":
                    continue  # unpacking
                replacement = ""
            elif token.string == "not" and tokens[i + 1].string == "in":
                replacement = ""
            elif token.string == "is" and tokens[i + 1].string == "not":
                continue  # "not" itself is a place
            else:
                replacement = SWAPS.get(token.string)
        elif token.type == tokenize.NUMBER and NUMBER.fullmatch(token.string):
            replacement = mutate_number(token.string)
        if replacement is not None:
            yield token.start[0], token.start[1], token.end[1], replacement


def cpp_places(text: str) -> Iterator[tuple[int, int, int, str]]:
    """The same of a C++ or CUDA file."""
    in_comment = False
    for number, line in enumerate(text.splitlines(), 1):
        if in_comment or line.lstrip().startswith("/*"):
            in_comment = "*/" not in line
            continue
        if CPP_NO_PLACE.search(line) or '"' in line:
            continue
        matches = list(CPP_TOKEN.finditer(line))
        for i, match in enumerate(matches):
            token = match[0]
            before = matches[i - 1][0] if i else ""
            after = matches[i + 1][0] if i + 1 < len(matches) else ""
            replacement = None
            # < and > of templates, * and & of pointers: an operator has a blank on both sides.
            spaced = line[match.start() - 1 : match.start()] == " " and line[match.end() : match.end() + 1] == " "
            if token in ("true", "false", "min", "max"):
                replacement = SWAPS[token] if token not in ("min", "max") or after == "(" else None
            elif token == "!" and after != "=":
                replacement = ""
            elif token in ("++", "--"):
                continue
            elif token == "-" and not spaced and before in ("=", "(", ",", "return", "?", ":", "*", ""):
                replacement = ""
            elif token in SWAPS and spaced and not re.match(r"\w+$", token):
                pointer = (
                    token in ("*", "&") and re.match(r"^\s*(const )?\w+(::\w+)*\*? ", line) and before in ("const",)
                )
                replacement = None if pointer else SWAPS[token]
            elif NUMBER.fullmatch(token.rstrip("fuUlL")) and before not in ("<", "::") and after not in (">", "::"):
                replacement = mutate_number(token)
            if replacement is not None:
                yield number, match.start(), match.end(), replacement


def files(root: Path, kind: str) -> list[str]:
    found = {p for pattern in FILES[kind] for p in root.glob(pattern) if p.is_file()}
    names = sorted(str(p.relative_to(root)) for p in found)
    return [name for name in names if not LEFT_OUT.search(name) and not name.endswith(".so")]


DEPTH = 4  # places of a file that can be drawn


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def draw(root: Path, seed: int = SEED) -> list[Mutant]:
    """All mutants of the tree in ``root``."""
    out = []
    for kind, count in COUNTS.items():
        turns = [(_hash(seed, kind, name, turn), name, turn) for name in files(root, kind) for turn in range(DEPTH)]
        places: dict[str, list[Mutant]] = {}
        drawn: list[Mutant] = []
        for _, name, turn in sorted(turns):
            if len(drawn) == count:
                break
            if name not in places:
                places[name] = _by_hash(kind, name, (root / name).read_text(), seed)
            if turn < len(places[name]):
                drawn.append(places[name][turn])
        out += drawn
    return out


def _by_hash(kind: str, name: str, text: str, seed: int) -> list[Mutant]:
    """All mutants of a file, in an order that the seed and each one's own line tell."""
    lines, seen = text.splitlines(), Counter[tuple[str, int]]()
    found: list[tuple[bytes, Mutant]] = []
    for number, start, end, replacement in (python_places if name.endswith(".py") else cpp_places)(text):
        line = lines[number - 1]
        what = f"{line[start:end]} -> {replacement or 'nothing'} at {start}"
        place = line.strip(), start - (len(line) - len(line.lstrip()))
        found.append(
            (
                _hash(seed, name, *place, seen[place]),
                Mutant(kind, name, number, line, line[:start] + replacement + line[end:], what, seen[place]),
            )
        )
        seen[place] += 1
    return [mutant for _, mutant in sorted(found, key=lambda one: one[0])]
