"""Streams of no use, and a slow drift after training: what SAGE says of them and what they cost. Prints Markdown tables.

    python benchmarks/streams.py [--out DIR] [--seeds 3] [--quick]

On the study's synthetic data set: the same model with a further modality of pure noise, and with a late copy of another
one, each in training and test alike; and with the test clips in order, one modality further off in each. --quick: a small
data set, one seed, few steps; it shows that all of it runs, and its numbers mean little.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sage_ext.data import AffWild2, write_dataset
from sage_ext.study.methods import REFERENCE, expanded
from sage_ext.study.plan import DATA, Study, has_quality
from sage_ext.study.streams import slow_drift, useless_streams

QUICK = {"seed": 1, "train": 12, "validation": 4, "test": 10, "frames": (90, 200)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", metavar="DIR", help="keeps data and studies, and continues them (default: nothing is kept)"
    )
    parser.add_argument("--seeds", type=int, help="default: 3, quick 1")
    parser.add_argument("--max-steps", type=int, help="default: 700, quick 60")
    parser.add_argument("--methods", default=REFERENCE, help="of the study, separated by commas (default: sage)")
    parser.add_argument("--processes", type=int, help="at once, of one thread each (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="a small data set, one seed, 60 steps")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(args.out or temporary)
        root = out / "data"
        if not root.exists():
            write_dataset(root, **(QUICK if args.quick else DATA))
        steps = args.max_steps or (60 if args.quick else 700)
        study = Study(
            str(root),
            expanded(args.methods.split(","), None, has_quality(AffWild2(root, "train"))),
            seeds=args.seeds or (1 if args.quick else 3),
            rates=(2e-3,),
            train={"dim": 32, "batch_size": 8, "epochs": 1000, "max_steps": steps},
        )
        options = {"processes": args.processes or os.cpu_count(), "quiet": not sys.stderr.isatty()}
        tables = [useless_streams(study, out, **options), *slow_drift(study, out, **options)]
        print("\n".join(table.markdown() for table in tables))


if __name__ == "__main__":
    main()
