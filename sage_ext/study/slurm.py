"""A study on a cluster: the script that hands its phases to Slurm as arrays of tasks, each an ordinary `sage-ext compare`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._arguments import check_int
from ..files import write_atomic

SCRIPT = "slurm.sh"

_HEAD = """#!/bin/bash
# Written by: sage-ext compare --launcher slurm. Submits the study:   bash {script} [options of sbatch, for all tasks]
# A phase begins when all tasks of the one before have ended, however they ended (afterany). The last task is the study's
# own command: it does what is left, tries again what failed, and writes the tables. So this script may be submitted again.
set -euo pipefail
compare={command}
submit() {{ sbatch --parsable --requeue --cpus-per-task={processes} --chdir={folder} "$@" | cut -d ";" -f 1; }}
"""


def write_script(
    out: str | os.PathLike[str],
    command: Sequence[str],
    jobs: Mapping[str, int],
    *,
    tasks: int,
    processes: int,
) -> Path:
    """Writes OUT/slurm.sh, which submits the study that was begun in directory `out`; returns its path.

    `command`: the command line behind `sage-ext`, its paths from the working directory of this call. `jobs`: {phase: how many
    it has}, in order. `tasks`: of a phase at most. `processes`: of a task, and its cores. ValueError for less than 1.
    """
    check_int("tasks", tasks, 1)
    check_int("processes", processes, 1)
    path, folder = (Path(out) / SCRIPT).resolve(), os.getcwd()
    # The last of an option counts.
    line = shlex.join(
        [sys.executable, "-m", "sage_ext", *command, "--launcher", "local", "--processes", str(processes)]
    )
    quote = shlex.quote
    text = _HEAD.format(script=quote(str(path)), command=quote(line), processes=processes, folder=quote(folder))
    before = ""
    logs = str(path.parent).replace("%", "%%")
    for phase, count in jobs.items():
        if not count:
            continue
        shares = min(tasks, count)
        output = quote(f"{logs}/slurm-{phase}-%A-%a.log")
        text += f'{phase}=$(submit "$@" --job-name={phase} --array=1-{shares} --output={output}{before} \\\n'
        text += f'  --wrap="$compare --share {phase}:\\$SLURM_ARRAY_TASK_ID/{shares}")\n'
        before = f" --dependency=afterany:${phase}"
    text += f'tables=$(submit "$@" --job-name=tables --output={quote(logs + "/slurm-tables-%j.log")}{before} --wrap="$compare")\n'
    text += 'echo "submitted; the last task is $tables"\n'
    write_atomic(path, text)
    return path
