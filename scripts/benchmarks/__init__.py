"""The parts of scripts/benchmark.py: one module a subcommand, and what they share (timing, machine, report, fresh)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler need not say when it starts
