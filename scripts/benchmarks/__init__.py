"""The parts of scripts/benchmark.py: one module a subcommand, and what they share (timing, machine, report, fresh)."""
