# SPDX-License-Identifier: Apache-2.0
"""A module's forward and backward passes as CUDA graphs, for each shape of its inputs.

As called from Python a network of this kind launches some 1,000 short kernels a step, and most hosts take longer to
queue them than the GPU to run them. A graph is one launch. ``torch.cuda.make_graphed_callables`` makes one for a single
shape, and leaves results where the next call overwrites them; here are any shapes, and results are the caller's own.

A call goes through :mod:`module`, which looks at its :mod:`arguments` and at the module's :mod:`anatomy`. A new shape's
:mod:`passes` are recorded by a :mod:`recorder`, gradients of parameters as one :mod:`packing`; the :mod:`graph` replays
them.
"""

from groupmamba.cuda_graphs.module import CudaGraphs, use_cuda_graphs

__all__ = ["CudaGraphs", "use_cuda_graphs"]
