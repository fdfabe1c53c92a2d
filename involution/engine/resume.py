"""The checkpoint that a run goes on from (train.resume)."""

import logging
import os
from pathlib import Path

from involution.engine.checkpoint import CheckpointFolder
from involution.engine.distributed import World, gather_objects
from involution.engine.errors import UserError
from involution.engine.rendezvous import started_again
from involution.engine.run import RunFolder
from involution.weights.run_file import State, read

log = logging.getLogger("involution")


def state_to_resume(resume: str, run: RunFolder, world: World) -> State | None:
    """The state to go on from, for auto | never | PATH. With never, what an earlier run left in the folder goes.

    Rank 0 chooses the checkpoint, so that ranks cannot choose differently. Of a run that began from a PATH its own
    checkpoints continue, so that the same command started again does.

    Raises:
        UserError: every checkpoint of the run is damaged, or PATH is none.
    """
    if resume == "never" and started_again():
        resume = "auto"
    if resume == "never":
        if world.is_main:
            run.start_over()
        return None
    try:
        found = CheckpointFolder(run.checkpoints).newest() if world.is_main else None
    except UserError:  # all are damaged
        if resume == "auto":
            raise
        found = None
    if found and resume != "auto" and origin(resume) != _began_from(found[1]):
        found = None
    path: Path | None = gather_objects(found and found[0])[0]
    if path is None:
        return None if resume == "auto" else read(_file(resume))
    if world.is_main:
        log.info("going on from %s", path)
    return found[1] if found else read(path)


def origin(resume: str) -> str | None:
    """The checkpoint that `train.resume` names, in whatever way; of a run's folder its last one."""
    return None if resume in ("auto", "never") else os.path.abspath(_file(resume))


def _file(resume: str) -> Path:
    return Path(resume, "checkpoints", "last.pt") if os.path.isdir(resume) else Path(resume)


def _began_from(state: State) -> str | None:
    """The checkpoint that a run began from, however often it went on since."""
    return state["origin"] if "origin" in state else origin(state["config"]["train"]["resume"])  # of earlier code
