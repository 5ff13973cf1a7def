# SPDX-License-Identifier: Apache-2.0
"""Scan directions: their names, their codes in the compiled ops, and the one place that checks them."""

from __future__ import annotations

from collections.abc import Sequence

from groupmamba_ext._checks import shown

DIRECTIONS = ("lr", "rl", "tb", "bt")  # the code of each in csrc/schemas.cpp is its place here


class Directions(tuple[str, ...]):
    """Direction names that were checked, with the codes that the compiled ops take.

    A layer makes them once, when it is built, and hands them to its parts, which do not look at the names again.
    """

    codes: tuple[int, ...]

    def __new__(cls, names: Sequence[str]) -> Directions:
        self = super().__new__(cls, names)
        self.codes = tuple(DIRECTIONS.index(name) for name in self)
        return self

    @classmethod
    def of(cls, value: object, count: int | None) -> Directions:
        """``value`` as directions, one for each of ``count`` groups, or with None any number from 1 on.

        Raises:
            TypeError: ``value`` is no sequence of strings.
            ValueError: a name is unknown, or there are not ``count`` of them.
        """
        direction_codes("", value, count)
        return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]


def direction_codes(owner: str, value: object, count: int | None) -> tuple[int, ...]:
    """The codes of ``value``, checked as in `Directions.of` unless it was before; ``owner`` names whose argument it is,
    as ``"op: "``, or is empty."""
    names = value if type(value) is Directions else _checked_names(owner, value)
    if not names if count is None else len(names) != count:
        wanted = "at least one direction" if count is None else f"one direction a group ({count})"
        raise ValueError(f"{owner}directions must name {wanted}, got {tuple(names)!r}")
    return names.codes if type(names) is Directions else tuple(DIRECTIONS.index(name) for name in names)


def _checked_names(owner: str, value: object) -> Sequence[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{owner}directions must be a sequence of names from {DIRECTIONS}, got {shown(value)}")
    for item in value:
        if not isinstance(item, str):
            raise TypeError(f"{owner}directions must hold names from {DIRECTIONS}, got {shown(item)}")
        if item not in DIRECTIONS:
            raise ValueError(f"{owner}directions must be from {DIRECTIONS}, got {item!r} in {shown(tuple(value))}")
    return value
