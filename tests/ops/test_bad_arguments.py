# SPDX-License-Identifier: Apache-2.0
"""What constructors and ops refuse, before anything runs: TypeError for types, dtypes and layouts, ValueError for
values, each naming the argument and what came."""

import warnings

import numpy as np
import pytest
import torch

import groupmamba_ext as ext
from groupmamba import ChannelAffinity, GroupedMamba2d, VSSSBlock
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.group_core import GroupCore
from support.inputs import conv_inputs, cross_inputs, modulated_inputs, pool_inputs
from support.scan import inputs as scan_inputs

INF, NAN = float("inf"), float("nan")
ARRAY = np.array(["lr", "rl"])
OWN = {  # what each constructor is given where it is asked for nothing else
    GroupedMamba2d: {"dim": 16},
    VSSSBlock: {"dim": 8},
    ChannelAffinity: {"dim": 8},
    ConvFeedForward: {"dim": 8, "hidden_dim": 8},
    GroupCore: {"groups": 2, "dim": 8, "directions": ("lr", "tb")},
}
SHARED = [  # of all that have the argument
    ("dim", True, TypeError, "must be an int, got True"),
    ("dim", 16.0, TypeError, "must be an int, got 16.0"),
    ("dim", torch.tensor(16), TypeError, "must be an int, got tensor(16)"),
    ("dim", 0, ValueError, "got 0"),
    ("dim", -4, ValueError, "got -4"),
    ("dim", 10**30, ValueError, f"must be at most {2**31 - 1}, got 1{'0' * 30}"),
    ("dim", 10**5000, ValueError, "got int too long to be shown"),
    ("hidden_dim", NAN, TypeError, "must be an int, got nan"),
    ("hidden_dim", 0, ValueError, "got 0"),
    ("groups", False, TypeError, "must be an int, got False"),
    ("d_state", 257, ValueError, "must be at most 256, got 257"),
    ("d_state", 0, ValueError, "got 0"),
    ("d_state", True, TypeError, "got True"),
    ("d_state", 1.0, TypeError, "got 1.0"),
    ("d_conv", True, TypeError, "got True"),
    ("d_conv", 3.0, TypeError, "got 3.0"),
    ("d_conv", None, TypeError, "got None"),
    ("d_conv", 2, ValueError, "must be 1 or 3, got 2"),
    ("expand", INF, ValueError, "got inf"),
    ("expand", -INF, ValueError, "got -inf"),
    ("expand", NAN, ValueError, "got nan"),
    ("expand", 10**400, ValueError, "got 1000"),
    ("expand", 1e308, ValueError, "got 1e+308"),
    ("expand", True, TypeError, "got True"),
    ("expand", torch.tensor(1.0), TypeError, "got tensor(1.)"),
    ("mlp_ratio", INF, ValueError, "got inf"),
    ("mlp_ratio", NAN, ValueError, "got nan"),
    ("mlp_ratio", 0.01, ValueError, "got 0.01"),
    ("mlp_ratio", "4", TypeError, "got '4'"),
    ("dt_rank", INF, TypeError, "got inf"),
    ("dt_rank", True, TypeError, "got True"),
    ("dt_rank", None, TypeError, "got None"),
    ("dt_rank", ARRAY, TypeError, "got array("),
    ("dt_rank", "many", ValueError, "got 'many'"),
    ("directions", ARRAY, TypeError, "got array("),
    ("directions", None, TypeError, "got None"),
    ("directions", {"lr"}, TypeError, "got {'lr'}"),
    ("directions", (ARRAY, "lr", "rl", "tb"), TypeError, "got array("),
    ("directions", ("lr", torch.tensor([1, 2])), TypeError, "got tensor("),
    ("directions", (0, 1, 2, 3), TypeError, "got 0"),
    ("direction", ARRAY, TypeError, "got array("),
    ("direction", 0, TypeError, "got 0"),
    ("direction", "LR", ValueError, "got 'LR'"),
    ("scan", ARRAY, TypeError, "got array("),
    ("scan", True, TypeError, "got True"),
    ("scan", None, ValueError, "got None"),
    ("variant", ["paper"], TypeError, "got ['paper']"),
    ("variant", "Paper", ValueError, "got 'Paper'"),
    ("affinity", "no", TypeError, "must be a bool, got 'no'"),
    ("affinity", 0, TypeError, "must be a bool, got 0"),
    ("affinity", None, TypeError, "must be a bool, got None"),
    ("out_proj", 1, TypeError, "must be a bool, got 1"),
    ("reduction", INF, TypeError, "got inf"),
    ("reduction", -1, ValueError, "got -1"),
    ("out_dim", 0, ValueError, "got 0"),
    ("out_dim", "8", TypeError, "got '8'"),
    ("dtype", torch.int32, TypeError, "got torch.int32"),
    ("dtype", torch.complex64, TypeError, "got torch.complex64"),
    ("dtype", "float32", TypeError, "got 'float32'"),
]


def takes(cls, name):
    if name == "directions" and cls is VSSSBlock:
        return False
    return name in cls.__init__.__annotations__


CASES = [(cls, *case) for case in SHARED for cls in OWN if takes(cls, case[0])]


@pytest.mark.parametrize("cls, name, value, error, words", CASES, ids=[f"{c[0].__name__} {c[1]}" for c in CASES])
def test_constructors(cls, name, value, error, words):
    if cls is GroupedMamba2d and name == "directions" and value is None:
        pytest.skip("None means the variant's own")
    with pytest.raises(error) as caught:
        cls(**{**OWN[cls], name: value})
    assert name in str(caught.value) and words in str(caught.value)


def test_reduction_is_checked_without_an_affinity_too():
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        GroupedMamba2d(16, affinity=False, reduction=0)


@pytest.mark.parametrize("variant", ["released", "fused", "paper"])
def test_the_most_states_run(variant):
    layer = GroupedMamba2d(8, variant=variant, d_state=256)
    layer(torch.randn(1, 8, 2, 3)).sum().backward()
    assert layer.extra_repr()


def like(tensor, kind):
    """A tensor of the same numbers that no op takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and betas of torch
        if kind == "mkldnn":
            return tensor.to_mkldnn()
        if kind == "nested":
            return torch.nested.nested_tensor(list(tensor.unbind(0)) if tensor.dim() > 1 else [tensor])
        if kind == "jagged":
            pieces = list(tensor.unbind(0)) if tensor.dim() > 1 else [tensor]
            return torch.nested.nested_tensor(pieces, layout=torch.jagged)
        if kind == "quantized":
            return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        if kind == "sparse_csr":
            return tensor.flatten(1).to_sparse_csr()
        if kind == "sparse":
            return tensor.to_sparse()
    return tensor.to(kind)


LAYOUTS = {
    "sparse": "layout torch.sparse_coo",
    "sparse_csr": "layout torch.sparse_csr",
    "mkldnn": "layout torch._mkldnn",
    "nested": "nested tensor",
    "jagged": "nested tensor",
}
KINDS = {
    **LAYOUTS,
    "quantized": "torch.qint8",
    torch.complex64: "torch.complex64",
    torch.int64: "torch.int64",
    torch.bool: "torch.bool",
    torch.float8_e4m3fn: "torch.float8_e4m3fn",
}
OPS = {
    "grouped_selective_scan": scan_inputs,
    "cross_selective_scan": cross_inputs,
    "depthwise_conv3x3": conv_inputs,
    "layer_norm_pool": pool_inputs,
    "modulated_layer_norm": modulated_inputs,
}


@pytest.mark.parametrize("low", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ops(op, kind, low):
    """Each tensor of each op in turn, of another layout or dtype; under autocast too, which converts floats alone."""
    tensors = OPS[op]("cpu")
    for name, tensor in tensors.items():
        if kind == "sparse_csr" and tensor.dim() < 2:
            continue
        changed = {**tensors, name: like(tensor, kind)}
        with torch.autocast("cpu", torch.bfloat16, enabled=low), pytest.raises(TypeError) as caught:
            getattr(ext, op)(**changed)
        assert f"{op}: {name} " in str(caught.value) and KINDS[kind] in str(caught.value)


@pytest.mark.parametrize("value", [ARRAY, torch.zeros(3), 1, ["gelu"]], ids=["array", "tensor", "int", "list"])
def test_activation(value):
    with pytest.raises(TypeError, match="activation must be one of"):
        ext.depthwise_conv3x3(**conv_inputs("cpu"), activation=value)


@pytest.mark.parametrize("op", ["grouped_selective_scan", "cross_selective_scan"])
@pytest.mark.parametrize("item", [ARRAY, torch.zeros(4), 1, None], ids=["array", "tensor", "int", "None"])
def test_directions(op, item):
    with pytest.raises(TypeError, match=rf"{op}: directions must hold names from .*, got"):
        getattr(ext, op)(**OPS[op]("cpu"), directions=("lr", item, "tb", "bt"))


@pytest.mark.parametrize("low", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("cls, options", [
    (GroupedMamba2d, {}), (GroupedMamba2d, {"variant": "fused"}), (GroupedMamba2d, {"variant": "paper"}),
    (VSSSBlock, {}), (ChannelAffinity, {}),
])  # fmt: skip
def test_layer_inputs(cls, options, kind, low):
    module, x = cls(16, **options), like(torch.randn(2, 16, 3, 4), kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=low), pytest.raises(TypeError) as caught:
        module(x)
    assert str(caught.value).startswith("x must be ") and KINDS[kind] in str(caught.value)


def test_compiled_calls_are_checked():
    """The checks read layouts and say what is wrong under torch.compile as well."""
    tensors = pool_inputs("cpu")
    compiled = torch.compile(lambda x, w, b: ext.layer_norm_pool(x, w, b)[0] * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors.values()), ext.layer_norm_pool(**tensors)[0] * 2)
