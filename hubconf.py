# SPDX-License-Identifier: Apache-2.0
"""Entry points for ``torch.hub``: ``torch.hub.load(CLONE, "groupmamba_tiny", source="local", num_classes=10)``.

torch.hub runs Python files as they are and compiles nothing, so the package has to be installed: ``pip install
'.[models]'`` in the clone. Arguments are those of the builders in ``groupmamba.models``.
"""

dependencies = ["torch", "timm", "groupmamba"]

try:
    from groupmamba.models import groupmamba_base, groupmamba_small, groupmamba_tiny  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"torch.hub needs groupmamba with its compiled ops ({error}): run pip install '.[models]' in the clone",
        name=error.name,
    ) from error
