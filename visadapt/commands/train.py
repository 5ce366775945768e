"""`visadapt train config.py`: train adapters and heads, leave a complete run folder."""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", default=[], help="a.b.c=value, for keys that the config has")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="the same as positional overrides")
    parser.add_argument("--work-dir", help="folder of the run; work_dirs/<config> by default")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="go on from the folder's newest checkpoint, or from the one given"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the folder")


def run(args: argparse.Namespace) -> int:
    from .. import config

    overrides, resume = [*args.overrides, *args.cfg_options], args.resume
    if resume is not None and "=" in resume and not Path(resume).exists():  # the option takes in the word behind it
        overrides, resume = [resume, *overrides], "auto"
    train(config.load(args.config, overrides), args.work_dir, resume=resume, overwrite=args.overwrite)
    gc.collect()  # the network holds the process group, whose threads would abort the process if they outlived it
    return 0


def train(cfg, work_dir: str | None = None, resume: str | None = None, overwrite: bool = False):
    """Run a checked config to its end.

    Args:
        cfg: from `visadapt.config.load`.
        work_dir: folder of the run.
        resume: None, "auto" for the folder's newest checkpoint, or a checkpoint.
        overwrite: replace an earlier run in the folder.

    Returns:
        The runner.
    """
    from .. import engine
    from ..checks import doubts
    from ..files import FULL
    from ..run_folder import RunFolder, claim, keep_schedule
    from ..run_report import write_report

    folder = Path(work_dir or cfg.get("work_dir") or Path("work_dirs") / Path(cfg.filename).stem)
    main_process = engine.is_main_process()
    if main_process:
        claim(folder, resume is not None, overwrite)
    if resume is not None:
        keep_schedule(cfg, folder if resume == "auto" else Path(resume).parent)
    written = RunFolder(copy.deepcopy(cfg), overwrite and resume is None)  # building takes entries out
    cfg.work_dir = str(folder)
    cfg.resume = resume is not None
    if resume not in (None, "auto"):
        cfg.load_from = resume
    failed = True
    try:
        runner = engine.build_runner(cfg)
        task = engine.unwrap(runner.model)
        if main_process:
            runner.register_hook(written)
            print(task.adapted.trainable_report(task.heads), flush=True)
            for said in doubts(task):
                print(f"visadapt: warning: {said}", file=sys.stderr, flush=True)
        runner.train()
        for path in write_report(runner):
            print(f"wrote {path}")
        failed = False
    except OSError as error:
        if error.errno in FULL:
            error.filename = error.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        engine.close(failed)
    return runner
