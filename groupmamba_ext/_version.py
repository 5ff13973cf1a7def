# SPDX-License-Identifier: Apache-2.0
"""The version of the distribution, stated here only: pyproject.toml and CMakeLists.txt read this line."""

__version__ = "0.1.0.dev0"
