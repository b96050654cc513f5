"""What runs have come to, small enough to be kept beside the code: results.json, errors.parquet.

No machine has all runs. What others, and runs that are no longer in the plan, have left in these
two files stays there; a machine without a single run changes nothing.
"""
import json
from pathlib import Path

import numpy as np
import pandas as pd
from battle_plan import Run, is_done, plan, run_folder
from battle_scores import library_of, units

from ribo_nb.data import MODS, atomic
from ribo_nb.train import read_log

KEY = ['table', 'what', 'k']


def read_json(path: Path):
    return json.loads(path.read_text())


def read_results(out: Path) -> tuple:  # two DataFrames
    "A row per run, from results.json; a row per run and unit, from errors.parquet"
    return pd.DataFrame(read_json(out/'results.json')), pd.read_parquet(out/'errors.parquet')


def result_of(run: Run, path: Path) -> dict:
    "The line of a finished run in results.json; `path`: its folder"
    metrics = read_json(path/'metrics.json')
    status = read_json(path/'status.json')
    start = json.loads((path/'starts.jsonl').read_text().splitlines()[-1])
    last = read_log(path)[-1]
    scores = metrics.get('scores', {}).get(metrics['model'], {})
    costs = dict(
        parameters=metrics['parameters'],
        finished=metrics['finished'],
        presentations=int(status['sequences']*last['step']/status['steps']),
        steps=last['step'],
        seconds=last['seconds'],
        device=start.get('gpu', 'CPU'),
        code=metrics['code'],
    )
    return dict(table=run.table, what=run.what, k=run.k) | scores | costs


def errors_of(run: Run, path: Path, groups: Path | None) -> pd.DataFrame:
    "The errors of a run, summed over what must not be counted twice"
    table = pd.read_parquet(path/'errors.parquet')
    unit = units(table, groups) if groups else np.arange(len(table))
    table = table.assign(unit=unit, library=library_of(table.dataset_name))
    sums = table.groupby(['unit', 'library', 'length'], as_index=False)[[*MODS, 'positions']].sum()
    sums = sums[sums.positions > 0].astype(dict.fromkeys(MODS, 'float32'))
    return sums.assign(table=run.table, what=run.what, k=run.k)


def without_empty(line: dict) -> dict:
    "Of runs that held nothing out there is no score"
    return {name: value for name, value in line.items() if value is not None}


def keep_results(lines: list, path: Path):
    "Into results.json, each in the place of the same run's earlier line"
    kept = {}
    for line in [*(read_json(path) if path.exists() else []), *lines]:
        kept[tuple(line[name] for name in KEY)] = without_empty(line)
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(list(kept.values()), indent=1))


def keep_errors(tables: list, path: Path):
    "Into errors.parquet, instead of the same runs' earlier ones"
    new = pd.concat(tables, ignore_index=True)
    if path.exists():
        old = pd.read_parquet(path)
        is_new = pd.MultiIndex.from_frame(old[KEY]).isin(pd.MultiIndex.from_frame(new[KEY]))
        new = pd.concat([old[~is_new], new], ignore_index=True)
    with atomic(path) as tmp:
        new.to_parquet(tmp, compression='zstd')


def collect(folder: Path, out: Path, groups: Path | None = None):
    "Finished runs of the plan into two files in `out`; ValueError when there is none"
    done = [run for run in plan() if is_done(folder, run.name)]
    if not done:
        raise ValueError(
            f"{Path(folder)/'runs'}: found no run with a metrics.json, expected some of the plan: "
            f'`python bench/battle.py prepare` and `run` make them. What is in {Path(out).name}/ '
            'stays as it is.')
    paths = {run: run_folder(folder, run.name) for run in done}
    lines = [result_of(run, path) for run, path in paths.items()]
    tables = [errors_of(run, path, groups) for run, path in paths.items()
              if (path/'errors.parquet').exists()]
    Path(out).mkdir(parents=True, exist_ok=True)
    if tables:
        keep_errors(tables, Path(out)/'errors.parquet')
    keep_results(lines, Path(out)/'results.json')
