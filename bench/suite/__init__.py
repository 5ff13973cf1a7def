# SPDX-License-Identifier: Apache-2.0
"""The parts of `bench/run.py`: cases, ground truth and checks, timers, measurements, peers, reports."""
