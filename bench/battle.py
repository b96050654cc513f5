"""The battle: all models on the same folds with the same budget, what each switch is worth, and
the weights that ship.

\b
    python bench/battle.py prepare ../shared/data/ribonanza_train_data.parquet \\
        --groups ../shared/data/ribonanza_sequence_groups.parquet \\
        --1m7 ../shared/data/eternabench_1m7_dev.parquet
    python bench/battle.py run            # everything, on one GPU; killed? the same command goes on
    python bench/battle.py run --shipped  # only what ships, and its siblings
    python bench/battle.py run --table scaled --threads 1  # one question, on two cores
    python bench/battle.py run --table main --workers 1    # another, on a GPU
    python bench/battle.py ship           # → ribo_nb/weights; then bench/strangers.py
    python bench/battle.py report         # → bench/battle/results.json, errors.parquet, tables
"""
import os
from pathlib import Path

import click
import pandas as pd
from battle_data import prepare_1m7, prepare_stores, store_path
from battle_plan import plan, what_ships, with_beginnings, work_in_parallel
from battle_results import collect, read_results
from battle_scores import floors, lookups, plot_ablation, table_of
from battle_ship import scores_by_noise, ship, shipped_scores

from ribo_nb.data import Command, Store, atomic, datamount

ROOT = Path(__file__).parents[1]
HERE = ROOT/'bench'/'battle'
AGAINST = dict(main='cfg_0', families='cfg_0', scaled='cfg_0')  # whom a table compares with
TABLES = list(dict.fromkeys(run.table for run in plan()))


class Commands(click.Group):
    "What is wrong with the input is a message, not a traceback"
    command_class = Command


@click.group(cls=Commands, help=__doc__)
@click.option('--folder', type=click.Path(path_type=Path),
              help='Stores, runs and predictions.  [default: datamount/battle]')
@click.pass_context
def main(ctx, folder):
    ctx.obj = folder or Path(os.path.relpath(datamount()/'battle'))


def write_csv(table: pd.DataFrame, name: str, **how):
    HERE.mkdir(exist_ok=True)
    with atomic(HERE/name) as tmp:
        table.to_csv(tmp, **how)


@main.command()
@click.argument('raw')
@click.option('--groups', type=click.Path(path_type=Path),
              help='Table with sequence_id, cluster, source and family: families that must not '
                   'straddle folds, beside our own; scans.')
@click.option('--1m7', 'm7', type=click.Path(path_type=Path),
              help='Table of 1M7 profiles, in the same format: to begin with, never to score.')
@click.pass_obj
def prepare(folder, raw, groups, m7):
    "RAW, Kaggle's wide table, → the stores of the battle"
    folds = prepare_stores(raw, groups, folder)
    click.echo(folds.rows.fold.value_counts().to_string())
    if m7:
        prepare_1m7(m7, folder)
    if groups:
        (folder/'groups.parquet').write_bytes(groups.read_bytes())


@main.command()
@click.option('--table', multiple=True, type=click.Choice(TABLES),
              help='Only these tables of the plan, and what they begin with.')
@click.option('--shipped', is_flag=True, help='Only what ships, and its siblings.')
@click.option('--hours', default=12., show_default=True, help='Runs stop in time.')
@click.option('--workers', default=2, show_default=True, help='Runs at the same time.')
@click.option('--threads', default=0, help="CPU threads of each.  [default: torch's]")
@click.pass_obj
def run(folder, table, shipped, hours, workers, threads):
    "Train what has not been trained yet"
    if threads:
        os.environ['OMP_NUM_THREADS'] = str(threads)
    chosen = what_ships() if shipped else plan()
    chosen = with_beginnings([one for one in chosen if not table or one.table in table])
    stores = {one.data: store_path(folder, one.data) for one in chosen}
    gone = sorted(name for name, path in stores.items() if not path.exists())
    if gone:
        names = ', '.join(stores[name].name for name in gone)
        click.echo(f'{folder}: no {names}: their runs are left out (see prepare --help)', err=True)
    chosen = [one for one in chosen if one.data not in gone]
    work_in_parallel(chosen, folder, 3600*hours, workers)


@main.command('ship')
@click.option('--out', default=ROOT/'ribo_nb'/'weights', type=click.Path(path_type=Path))
@click.pass_obj
def ship_command(folder, out):
    "Half-precision weights of the final runs, their ensemble and its error bars"
    groups = folder/'groups.parquet'
    if not groups.exists():
        raise ValueError(f'{groups} is missing: without it the scans have no scores of their own '
                         '(see prepare --help, --groups)')
    tables = ship(folder, out)
    rows = Store(store_path(folder, 'check')).rows
    found = dict(shipped=shipped_scores(tables, rows, groups), noise=scores_by_noise(tables, rows))
    for name, table in found.items():
        write_csv(table, f'{name}.csv', index=False)
        click.echo(table.round(4).to_string(index=False) + '\n')


@main.command()
@click.pass_obj
def report(folder):
    "Results of all finished runs, beside the lookups"
    groups = folder/'groups.parquet'
    collect(folder, HERE, groups if groups.exists() else None)
    if not (HERE/'lookups.csv').exists():  # minutes of folding by ViennaRNA
        write_csv(lookups(folder), 'lookups.csv', index=False)
    if not (HERE/'floors.csv').exists() and groups.exists():
        write_csv(floors(folder, groups), 'floors.csv', index_label='part')
    results, errors = read_results(HERE)
    for question in results[results.official.notna()].table.unique():
        table = table_of(results, errors, question, AGAINST.get(question))
        click.echo(f'\n{question}\n{table.to_string()}')
    with atomic(HERE/'ablation.png') as tmp:
        plot_ablation(results, errors).savefig(tmp, dpi=120, format='png')


if __name__ == '__main__':
    main()
