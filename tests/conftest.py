# SPDX-License-Identifier: Apache-2.0
"""Every op test runs on the CPU and, marked ``cuda``, on a GPU; without one the latter are skipped and counted."""

import os
import sys

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("generated cases", "tests/ops/test_generated.py")
    group.addoption("--fuzz", type=int, metavar="N", help="so many new cases on each device, in place of the same 210")
    group.addoption("--fuzz-seed", type=int, metavar="S", help="of --fuzz; by default a new one, which is printed")
    group.addoption("--case", metavar="JSON", help="replay the case of a failure")
    parser.addoption("--heavy", action="store_true", help="also the tests that take tens of GiB of a GPU, or minutes")


def pytest_terminal_summary(terminalreporter, config):
    """What was generated: counts and worst errors, and for each failure the line that replays it."""
    module = sys.modules.get("test_generated")
    if module is not None and (config.getoption("fuzz") or module.REPLAYS):
        terminalreporter.section("generated cases")
        terminalreporter.write_line(module.summary(config))


def pytest_configure():
    # Processes of pytest-xdist that each use all processors mostly wait for one another, unless the environment says
    # how many threads there are, as CI does.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("heavy"):
        for item in items:
            if "heavy" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --heavy"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For small images, over which threads would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
