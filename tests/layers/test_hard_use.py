# SPDX-License-Identifier: Apache-2.0
"""What long and large use meets: a NaN in one image, memory that runs out, another device, more than 2^31 elements,
thousands of training steps in 16 bits."""

import contextlib
import itertools
import math

import pytest
import torch

import groupmamba_ext as ext
from groupmamba import GroupedMamba2d
from groupmamba.layers.feed_forward import ConvFeedForward
from groupmamba.layers.token_norm import TokenNorm
from groupmamba_ext.ops.batch_norm_relu import batch_norm_relu
from groupmamba_ext.ops.token_norm import token_norm
from support.every_op import MODULES, OPS, PER_IMAGE, make_case, results, same

# A NaN in one image ---------------------------------------------------------------------------------


def _mixes_rows(dtype) -> bool:
    """Whether torch's own product on this CPU lets a NaN into the row before, as oneDNN 3.12 does in bfloat16 with AMX
    for some numbers of rows: it multiplies what lies behind a row of odd length by 0."""
    images = torch.ones(4, 17 * 23, 3, dtype=dtype)
    images[1] = float("nan")
    weight = torch.ones(4, 3, 16, dtype=dtype)
    alone = (images.flatten(0, 1) @ weight[0]).view(4, -1)
    together = torch.bmm(images.view(1, -1, 3).repeat(4, 1, 1), weight).view(4, 4, -1).transpose(0, 1)
    return any(bool(y[[0, 2, 3]].isnan().any()) for y in (alone, together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_a_nan_stays_in_its_image(device, dtype, name):
    """Results and gradients of the other images are what they are without it, bit for bit."""
    if device == "cpu" and name in MODULES and _mixes_rows(dtype):
        # Nothing of this project computes these products, and nothing that it could pass to them would help.
        pytest.skip("torch's matrix product lets a NaN into another row")
    function, tensors = make_case(name, device, dtype)
    images = [n for n in tensors if n in PER_IMAGE and tensors[n] is not None]

    def run(spoiled):
        leaves = {n: t for n, t in tensors.items() if n not in images}
        for n in images:
            leaves[n] = tensors[n].detach().clone()
            if n == spoiled:
                leaves[n][1].view(-1)[leaves[n][1].numel() // 3] = float("nan")
            leaves[n].requires_grad_()
        out = function(leaves)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad([o.float().sin().sum() for o in out], [leaves[n] for n in images])]

    clean, others = run(None), [0, 2, 3]
    for spoiled in images:
        got = run(spoiled)
        assert got[0][1].isnan().any(), f"a NaN in {spoiled} does not show"
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a[others], b[others]), f"a NaN in {spoiled} reaches other images"


# Memory that runs out -------------------------------------------------------------------------------


@contextlib.contextmanager
def no_memory():
    """With nothing of the GPU left to this process, not in torch's cache either."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    taken, size = [], 2**28
    try:
        while size >= 512:  # the least block of the cache
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        taken.clear()


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_memory_that_runs_out_in_a_backward(name):
    """The error is torch's own, and the next call is right."""
    case = make_case(name, "cuda", torch.float32, {"batch": 16, "h": 64, "w": 64})  # more than cached blocks hold
    expected = results(case)
    function, tensors = case
    leaves = {n: t if isinstance(t, torch.nn.Parameter) else None if t is None else t.detach().requires_grad_()
              for n, t in tensors.items()}  # fmt: skip
    out = function(leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum(o.float().sum() for o in out)
    asked = [leaf for leaf in leaves.values() if leaf is not None]
    with no_memory(), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(loss, asked, retain_graph=True)
    torch.autograd.grad(loss, asked)
    with no_memory(), pytest.raises(torch.OutOfMemoryError):
        results(case)
    same(results(case), expected)


def test_no_memory_on_the_cpu():
    """A result of 2^60 elements, from an image that is one element: what was asked for is in the error."""
    one = torch.ones(1, 1, 1, 1).expand(2**20, 2**15, 2**15, 1024)
    weight = torch.ones(1024, 3, 3)
    with pytest.raises(RuntimeError, match="ut of memory|can't allocate memory"):
        ext.depthwise_conv3x3(one, weight, None)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_error_of_memory(monkeypatch, device):
    """What the compiled op says of a GPU becomes torch's own error, in both passes; nothing else does."""
    from groupmamba_ext import registry

    said = f"groupmamba: {device.upper()} out of memory. Tried to allocate 1.00 GiB"
    x, weight = torch.randn(1, 3, 3, 4, requires_grad=True), torch.randn(4, 3, 3, requires_grad=True)
    y = ext.depthwise_conv3x3(x, weight, None)

    def raises(*args):
        raise RuntimeError(said)

    for name in ("depthwise_conv3x3_fwd", "depthwise_conv3x3_bwd"):
        monkeypatch.setitem(registry._overloads, name, raises)
    error = torch.OutOfMemoryError if device == "cuda" else RuntimeError
    with pytest.raises(error) as found:
        y.sum().backward()
    assert type(found.value) is error and said in str(found.value)
    with torch.no_grad(), pytest.raises(error) as found:
        ext.depthwise_conv3x3(x, weight, None)
    assert type(found.value) is error and said in str(found.value)


# Another device -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if torch.cuda.get_device_capability(0) != torch.cuda.get_device_capability(1):
        pytest.skip("needs two GPUs of one kind")
    expected = results(make_case(name, "cuda:0", torch.float32))
    case = make_case(name, "cuda:1", torch.float32)
    with torch.cuda.device(0):
        got = results(case)
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got.values())
    same({n: t.to("cuda:0") for n, t in got.items()}, expected)


# More than 2^31 elements ------------------------------------------------------------------------------

MANY = 2**31 + 2**20
SIDE = 56


def many_images(channels: int) -> int:
    return math.ceil(MANY / (SIDE * SIDE * channels))


def large_cases():
    """Name: (GiB that it takes at most, a function that makes the case: a function, tensors, names of images)."""

    def images(*last, batch):
        # Each image is one of 7, so that a wrong address shows and no time goes into random numbers.
        few = torch.randn(7, SIDE, SIDE, *last, device="cuda", dtype=torch.bfloat16)
        return few.repeat(-(-batch // 7), *[1] * (few.dim() - 1))[:batch]

    def parameter(*shape, mean=0.0, scale=1.0):
        return (mean + scale * torch.randn(*shape)).cuda()

    def scan(dim, states, rank, groups=4):
        batch = many_images(groups * dim)
        tensors = {
            "u": images(groups, dim, batch=batch), "dt": images(groups, rank, batch=batch),
            "A": -parameter(groups, dim, states).abs() - 0.1, "B": images(groups, states, batch=batch),
            "C": images(groups, states, batch=batch), "D": parameter(groups, dim),
            "dt_weight": parameter(groups, dim, rank), "dt_bias": parameter(groups, dim, mean=-2.0),
            "z": images(groups, dim, batch=batch), "norm_weight": parameter(groups, dim),
            "norm_bias": parameter(groups, dim), "gate": torch.rand(batch, groups, dim, device="cuda"),
        }  # fmt: skip
        return (lambda t: ext.grouped_selective_scan(**t)), tensors

    def cross(dim=64, count=2):
        batch = many_images(dim)
        tensors = {
            "u": images(dim, batch=batch), "dt": images(count, 4, batch=batch),
            "A": -parameter(count, dim, 1).abs() - 0.1, "B": images(count, 1, batch=batch),
            "C": images(count, 1, batch=batch), "D": parameter(count, dim), "dt_weight": parameter(count, dim, 4),
            "dt_bias": parameter(count, dim, mean=-2.0),
        }  # fmt: skip
        return (lambda t: ext.cross_selective_scan(**t, directions=("tb", "rl"))), tensors

    def conv(channels=96):
        tensors = {"x": images(channels, batch=many_images(channels)), "weight": parameter(channels, 3, 3),
                   "bias": parameter(channels)}  # fmt: skip
        return (lambda t: ext.depthwise_conv3x3(**t, activation="silu")), tensors

    def affine(channels):
        return {"weight": parameter(channels, mean=1.0, scale=0.1), "bias": parameter(channels)}

    def pool(channels=96):
        tensors = {"x": images(channels, batch=many_images(channels)), **affine(channels)}
        return (lambda t: ext.layer_norm_pool(**t)), tensors

    def modulated(dim=24):
        batch = many_images(4 * dim)
        tensors = {"o": images(4, dim, batch=batch), "x": images(4 * dim, batch=batch), "scale": parameter(1, mean=1.0),
                   **affine(4 * dim), "gate": torch.rand(batch, 4 * dim, device="cuda")}  # fmt: skip
        # Without a large eps the norm takes the scale out again, and its gradient is what rounding leaves of 0.
        return (lambda t: ext.modulated_layer_norm(**t, eps=1.0)), tensors

    def token(channels=96):
        tensors = {"x": images(channels, batch=many_images(channels)), **affine(channels)}
        return (lambda t: token_norm(**t, eps=1e-6)), tensors

    def module(net, dim):
        net = net.cuda().bfloat16()
        return (lambda t: net(t["x"])), {"x": images(dim, batch=many_images(dim)), **dict(net.named_parameters())}

    return {
        "grouped scan": (80, lambda: scan(16, 1, 1)),
        "grouped scan, odd": (80, lambda: scan(21, 2, 2)),
        "cross scan": (90, cross),
        "convolution": (40, conv),
        "norm and mean": (40, pool),
        "modulated norm": (50, modulated),
        "token norm": (40, token),
        "released layer": (125, lambda: module(Tokens(GroupedMamba2d(64)), 64)),
        "feed-forward": (110, lambda: module(NormedFeedForward(64), 64)),
    }


class Tokens(torch.nn.Module):
    """A layer on channels-last images."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, tokens=True, residual=True)


class NormedFeedForward(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.mlp = TokenNorm(dim, eps=1e-6), ConvFeedForward(dim, dim)

    def forward(self, x):
        return self.mlp(x, self.norm, residual=True)


LARGE = (
    "grouped scan", "grouped scan, odd", "cross scan", "convolution", "norm and mean", "modulated norm", "token norm",
    "released layer", "feed-forward",
)  # fmt: skip


@pytest.fixture
def free_memory():
    """A function that skips the test where the GPU has less memory left than it needs, in GiB."""
    torch.cuda.empty_cache()

    def need(gib):
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib} GiB of GPU memory, and {free:.0f} are free")

    yield need
    torch.cuda.empty_cache()


def close(got, expected, name):
    """Within the rounding of 16 bits, over the whole of a tensor."""
    got, expected = got.double(), expected.double()
    assert got.isfinite().all(), f"{name} is not finite"
    error = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    assert error < 2e-2, f"{name}: relative error {error:.2e}"


@pytest.mark.cuda
@pytest.mark.heavy
@pytest.mark.parametrize("name", LARGE)
def test_more_elements_than_32_bits_count(name, free_memory):
    """The last image, and the gradients that come from it alone, are what they are without the others."""
    gib, make = large_cases()[name]
    free_memory(gib)
    torch.manual_seed(0)
    function, tensors = make()
    images = [n for n in tensors if n in PER_IMAGE]
    assert max(tensors[n].numel() for n in images) > 2**31

    def run(part):
        leaves = {n: t if isinstance(t, torch.nn.Parameter) else t.detach().requires_grad_() for n, t in part.items()}
        out = function(leaves)
        out = out if isinstance(out, tuple) else (out,)
        given = [torch.zeros_like(o) for o in out]
        for g in given:
            g[-1] = torch.linspace(-1, 1, g[-1].numel(), device="cuda").view(g[-1].shape).mul(40).sin()
        grads = torch.autograd.grad(out, list(leaves.values()), given)
        kept = [o[-1].detach().clone() for o in out]
        return kept + [g[-1].clone() if n in images else g for n, g in zip(leaves, grads, strict=True)]

    names = ["out", "mean"][: 2 if name == "norm and mean" else 1] + [f"d{n}" for n in tensors]
    alone = run({n: t[-1:].clone() if n in images else t for n, t in tensors.items()})
    whole = run(tensors)
    for label, a, b in zip(names, whole, alone, strict=True):
        close(a, b, label)


@pytest.mark.cuda
@pytest.mark.heavy
def test_one_image_of_more_elements_than_32_bits_count(free_memory):
    """States that fade within some hundred tokens: the last rows are what they are behind few rows."""
    free_memory(70)
    torch.manual_seed(0)
    groups, dim, side, rows = 4, 16, 5800, 4
    shape = (1, side, side, groups)
    assert math.prod(shape) * dim > 2**31

    def image(*last):
        return torch.randn(1, 29, side, groups, *last, device="cuda", dtype=torch.bfloat16).repeat(
            1, side // 29, 1, 1, 1
        )

    tensors = {"u": image(dim), "dt": image(1), "B": image(1), "C": image(1)}
    A = torch.full((groups, dim, 1), -2.0, device="cuda")
    options = {"dt_weight": torch.zeros(groups, dim, 1, device="cuda"), "directions": ("lr",) * groups}

    def run(part):
        leaves = {n: t.detach().requires_grad_() for n, t in part.items()}
        out = ext.grouped_selective_scan(A=A, **leaves, **options)
        given = torch.zeros_like(out)
        given[:, -rows:] = 1
        grads = torch.autograd.grad(out, list(leaves.values()), given)
        return [t[:, -rows:].detach().clone() for t in (out, *grads)]

    few = run({n: t[:, -2 * rows :].clone() for n, t in tensors.items()})
    for label, a, b in zip(("out", "du", "ddt", "dB", "dC"), run(tensors), few, strict=True):
        if label != "ddt":  # its weight is 0
            close(a, b, label)


@pytest.mark.cuda
@pytest.mark.heavy
def test_batch_norm_of_more_elements_than_32_bits_count(free_memory):
    """Statistics over all images: those of the 7 that repeat."""
    free_memory(40)
    torch.manual_seed(0)
    few = torch.randn(7, 64, SIDE, SIDE, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    repeats = math.ceil(MANY / few.numel())
    x = few.permute(0, 2, 3, 1).repeat(repeats, 1, 1, 1).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")

    def run(images):
        leaves = [t.detach().requires_grad_() for t in (images, weight, bias)]
        y, stats = batch_norm_relu(*leaves, 1e-5)
        grads = torch.autograd.grad(y, leaves, images * (7 / len(images)))
        return [y[-7:].detach().clone(), stats[[0, 2]], grads[0][-7:] * (len(images) / 7), *grads[1:]]

    for label, a, b in zip(("y", "stats", "dx", "dweight", "dbias"), run(x), run(few), strict=True):
        close(a, b, label)


# Thousands of training steps ---------------------------------------------------------------------------


class Digits(torch.nn.Module):
    """A small network of these layers for scanned digits."""

    def __init__(self, dim=64, depth=3):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, dim, 2, 2)
        self.layers = torch.nn.ModuleList(GroupedMamba2d(dim) for _ in range(depth))
        self.norms = torch.nn.ModuleList(TokenNorm(dim, eps=1e-6) for _ in range(2 * depth))
        self.mlps = torch.nn.ModuleList(ConvFeedForward(dim, 2 * dim) for _ in range(depth))
        self.head = torch.nn.Linear(dim, 10)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for layer, mlp, (norm1, norm2) in zip(
            self.layers, self.mlps, zip(self.norms[::2], self.norms[1::2], strict=True), strict=True
        ):
            x = x + layer(norm1(x), tokens=True)
            x = mlp(x, norm2, residual=True)
        return self.head(x.mean((1, 2)))


def train_on_digits(device, dtype, steps, seed=0, depth=3, batch=64, lr=2e-3):
    """Losses of each step, on real images: 1,797 scanned digits, moved by up to two pixels at random."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra 'demo'")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear").to(device)
    labels = torch.tensor(digits.target).to(device)
    torch.manual_seed(3)
    net = Digits(depth=depth).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=generator).to(device)
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = images[chosen].roll((dy, dx), (2, 3))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(net(x).float(), labels[chosen])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).cpu()
    assert all(p.isfinite().all() for p in net.parameters())
    return losses, scaler.get_scale()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_steps(device, dtype, one_thread):
    """A short run of the long one below."""
    losses, _ = train_on_digits(device, dtype, 40, depth=1, batch=32, lr=2e-2)
    assert losses.isfinite().all() and losses[-5:].mean() < 0.8 * losses[:3].mean()


@pytest.mark.cuda
@pytest.mark.heavy
def test_two_thousand_training_steps():
    """bf16 and fp16 with a scaler end with the loss of float32, within what another order of the images changes."""
    steps, last = 2000, 200
    float32 = [train_on_digits("cuda", torch.float32, steps, seed)[0] for seed in range(4)]
    ends = [losses[-last:].mean().item() for losses in float32]
    noise = max(abs(a - b) for a, b in itertools.combinations(ends, 2))
    print(f"float32: {ends}")
    for dtype in (torch.bfloat16, torch.float16):
        losses, scale = train_on_digits("cuda", dtype, steps)
        end = losses[-last:].mean().item()
        print(f"{dtype}: {end}, scale {scale}")
        assert losses.isfinite().all() and scale >= 1
        assert abs(end - ends[0]) <= max(2 * noise, 0.02), f"{dtype}: {end}, float32 {ends}"
