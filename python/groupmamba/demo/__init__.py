# SPDX-License-Identifier: Apache-2.0
"""``groupmamba demo``: a photograph through the layer, forward and backward, checked, timed and drawn.

`command` runs the others; `photo` and `picture` need the packages of the extra ``demo``, and are imported by it when
these are there.
"""
