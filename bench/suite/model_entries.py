# SPDX-License-Identifier: Apache-2.0
"""Which whole models are compared, by name, and how each is built; weights are random."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from suite import checkouts

OURS = ("groupmamba_tiny", "groupmamba_small", "groupmamba_base")
VARIED = {  # the tiny model: its variants, the paper's ablation, training as its recipes do, its passes in graphs
    "groupmamba_tiny, fused": {"variant": "fused"},
    "groupmamba_tiny, paper": {"variant": "paper"},
    "groupmamba_tiny, 4-D scanning": {"scan": "cross", "affinity": False},
    "groupmamba_tiny, no CAM": {"affinity": False},
    "groupmamba_tiny, drop path 0.2": {"drop_path_rate": 0.2},
    "groupmamba_tiny, use_cuda_graphs": {},
}
TIMM = (
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "caformer_s18",
    "hiera_small_224",
    "hgnetv2_b4",
    "deit3_small_patch16_224",
    "tiny_vit_11m_224",
)
VMAMBA = {  # beside which model each stands
    "vmamba_tiny_s1l8": "groupmamba_tiny",
    "vmamba_small_s2l15": "groupmamba_small",
    "vmamba_base_s2l15": "groupmamba_base",
}
COMPILED = ", compiled"
GRAPHS = ", use_cuda_graphs"
RELEASED = "released/"


@dataclass(frozen=True)
class Entry:
    """A model of the comparison; ``source`` is ours, timm, released or vmamba."""

    label: str
    source: str
    build: Callable[[], nn.Module]
    compiled: bool = False

    @property
    def name(self) -> str:
        """Of the model, compiled or not."""
        return self.label.removesuffix(COMPILED)


def require() -> None:
    """Raises:
    ValueError: this project's models cannot be had here.
    """
    try:
        import groupmamba.models  # noqa: F401
    except ImportError as error:
        raise ValueError(f"'model' cannot run: {error}") from None


def ours(label: str, **options) -> nn.Module:
    """One of :data:`OURS` or :data:`VARIED`; ``options`` override the latter's."""
    from groupmamba import models, use_cuda_graphs

    model = getattr(models, label.split(",")[0])(**(VARIED.get(label, {}) | options))
    if label.endswith(GRAPHS):
        use_cuda_graphs(model)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def entries(peers: Sequence[str], released: Path | None, vmamba: Path | None) -> list[Entry]:
    """This project's models and those of the peers asked for; compiled, too, with ``compile`` among them."""
    found = [Entry(name, "ours", lambda name=name: ours(name)) for name in OURS]
    varied = [Entry(name, "ours", lambda name=name: ours(name)) for name in VARIED]
    if "timm" in peers:
        found += [timm_entry(name) for name in TIMM]
    if "compile" in peers:
        found += [compiled(entry) for entry in list(found)]
    found += varied
    if "released" in peers:
        for name in OURS:
            build = lambda name=name: getattr(checkouts.load("released", released, "groupmamba"), name)()  # noqa: E731
            found.append(Entry(RELEASED + name, "released", build))
    if "vmamba" in peers:
        for name in VMAMBA:
            build = lambda name=name: getattr(checkouts.load("vmamba", vmamba, "vmamba"), name)()  # noqa: E731
            found.append(Entry(name, "vmamba", build))
    return found


def timm_entry(name: str) -> Entry:
    """Any model of timm as a peer."""
    return Entry(name, "timm", lambda: _timm(name))


def compiled(entry: Entry) -> Entry:
    """The same through `torch.compile`."""
    return replace(entry, label=entry.label + COMPILED, compiled=True)


def chosen(names: Sequence[str], found: Sequence[Entry], peers: Sequence[str]) -> list[Entry]:
    """The entries of ``names``, in the order of ``found``; other models of timm behind them.

    A name alone is the model as it is and, with ``compile`` among ``peers``, compiled; ``"NAME, compiled"`` the latter
    alone.

    Raises:
        ValueError: there is no model of a name, or it needs a peer that is not among ``peers``.
    """
    known = {entry.label: entry for entry in found}
    more: list[Entry] = []
    for name in names:
        plain = name.removesuffix(COMPILED)
        if name in known:
            continue
        if name != plain and "compile" not in peers:
            raise ValueError(f"{name!r} needs --peers compile")
        if plain not in known and not _is_timm(plain):
            choices = ", ".join(dict.fromkeys(entry.name for entry in found))
            raise ValueError(f"invalid choice: {name!r} (choose from {choices}, any model of timm)")
        if plain in known:
            more.append(compiled(known[plain]))
            continue
        if "timm" not in peers:
            raise ValueError(f"{name!r} needs --peers timm")
        if name == plain:
            more.append(timm_entry(plain))
        if "compile" in peers:
            more.append(compiled(timm_entry(plain)))
    wanted = [entry for entry in found if {entry.label, entry.name} & set(names)]
    return list({entry.label: entry for entry in (*wanted, *more)}.values())


def _is_timm(name: str) -> bool:
    if importlib.util.find_spec("timm") is None:
        return False
    import timm

    return bool(name) and timm.is_model(name)
