"""hydra/sweeper: Hydra's basic one, made for jobs of days (`hydra_plugins` is where Hydra looks for such things)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import read_write

from involution.engine.cli import print_result
from involution.engine.errors import Stopped
from involution.engine.run import log_to
from involution.engine.sweep import plan

log = logging.getLogger("involution")


class Sweeper(BasicSweeper):
    """Every combination of the given values is a job.

    All jobs are composed and checked before the first begins; finished ones are skipped; those that fail do not stop
    the rest and are listed at the end. The last line of standard output is one JSON object.

    Args:
        params: {key: value or comma-separated values}, as on the command line.
        rows: lists of overrides that belong together: each is combined with the rest.
    """

    def __init__(self, params: dict[str, str] | None, rows: Sequence[Sequence[str]] | None) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.rows = rows or [[]]

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs.

        Raises:
            UserError, HydraException: before the first job, for a key or value that cannot work.
            Stopped: after the last one, where some have failed.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        log_to(None, is_main=True)
        batch, varied = self._combinations(arguments)
        sweep_dir = Path(self.config.hydra.sweep.dir).absolute()
        config, loader = self.config, self.hydra_context.config_loader
        ranks = getattr(self.launcher, "ranks", 1)
        sweep_dir, jobs = plan(batch, lambda job: loader.load_sweep_config(config, job), sweep_dir, varied, ranks)
        with read_write(config):
            config.hydra.sweep.dir = str(sweep_dir)  # the launcher makes this folder

        todo = []
        for job in jobs:
            summary = None if job.starts_over else job.summary()
            if summary is None:
                todo.append(job)
            else:
                log.info("finished before: %s", job.folder.name)
                print_result(summary)
        reasons = {}
        if todo:
            returned = self.launcher.launch([job.overrides for job in todo], initial_job_idx=0)
            reasons = {job.folder: each.return_value for job, each in zip(todo, returned, strict=True)}
        log_to(None, is_main=True)
        failed = [job.folder for job in jobs if reasons.get(job.folder) or job.summary() is None]
        counts = {"jobs": len(jobs), "finished": len(jobs) - len(failed), "failed": len(failed)}
        print_result({"sweep_dir": str(sweep_dir), **counts})
        if failed:
            why = [reasons.get(folder) or "ended without a result" for folder in failed]
            count = f"{len(failed)} of {len(jobs)} jobs failed"
            if len(failed) > 1 and len(set(why)) == 1:
                raise Stopped(f"{count}, all of them: {why[0]}")
            listed = [f"  {folder.name}: {reason}" for folder, reason in zip(failed, why, strict=True)]
            raise Stopped("\n".join([f"{count}:", *listed]))

    def _combinations(self, arguments: list[str]) -> tuple[list[list[str]], set[str]]:
        """Every job's overrides, and the keys that vary."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        batch: list[list[str]] = []
        for row in self.rows:
            overrides = parser.parse_overrides([*self._parse_config(), *row, *arguments])
            for chunk in self.split_arguments(overrides, None):
                batch += chunk
        varied = {each.key_or_group for each in overrides if each.is_sweep_override()}
        varied |= {override.partition("=")[0] for row in self.rows for override in row}
        return batch, varied
