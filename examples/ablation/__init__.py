# SPDX-License-Identifier: Apache-2.0
"""The paper's ablation on Fashion-MNIST: ``run.py`` trains, ``report.py`` writes the page. See docs/ablation.md."""
