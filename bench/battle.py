"""The battle: all models on the same folds with the same budget, what each switch is worth, and the weights that ship.

\b
    python bench/battle.py prepare ../shared/data/ribonanza_train_data.parquet --groups ../shared/data/ribonanza_sequence_groups.parquet --1m7 ../shared/data/eternabench_1m7_dev.parquet
    python bench/battle.py run                    # everything, on one GPU; killed? the same command goes on
    python bench/battle.py run --shipped          # only what ships, and the siblings that say what it is worth
    python bench/battle.py run --table scaled --threads 1  # one question, on two cores
    python bench/battle.py run --table main --workers 1    # another, on a GPU: RibonanzaNet starves what runs beside it
    python bench/battle.py ship                   # → ribo_nb/weights
    python bench/battle.py report                 # → bench/battle/results.json, errors.parquet, tables and figures
"""
import os
from pathlib import Path
import click,numpy as np,pandas as pd,torch
from ribo_nb.battle import battle_stores,by_noise,collect,floors,lookups,more_data,needed,parallel_work,plan,plot_ablation,ship,shipped_scores,speed,table_of,what_ships
from ribo_nb.data import Command,Store,atomic,datamount

here = Path(__file__).parent/'battle'

class Commands(click.Group):
    "What is wrong with the input is a message, not a traceback"
    command_class = Command

@click.group(cls=Commands, help=__doc__)
@click.option('--folder', type=click.Path(path_type=Path), help='Stores, runs and predictions.  [default: datamount/battle]')
@click.pass_context
def main(ctx, folder): ctx.obj = folder or Path(os.path.relpath(datamount()/'battle'))

@main.command()
@click.argument('raw')
@click.option('--groups', help='Table with sequence_id, cluster, source and family: families that must not straddle folds, beside our own; scans.')
@click.option('--1m7', 'm7', help='Table of 1M7 profiles, in the same format: to pretrain on, never to score.')
@click.option('--more', multiple=True, help='Tables with a column `sequence`, for pseudo-labels; 1M7 is among them anyway.')
@click.pass_obj
def prepare(folder, raw, groups, m7, more):
    "RAW, Kaggle's wide table, → the stores of the battle"
    click.echo(battle_stores(raw, groups, folder).rows.fold.value_counts().to_string())
    if m7: more_data(folder, m7, more)
    if groups: (folder/'groups.parquet').write_bytes(Path(groups).read_bytes())

@main.command()
@click.option('--table', multiple=True, type=click.Choice(list(dict.fromkeys(j.table for j in plan()))), help='Only these tables of the plan, and what they wait for.')
@click.option('--shipped', is_flag=True, help='Only what ships, and its siblings.')
@click.option('--hours', default=12., show_default=True, help='Runs stop in time.')
@click.option('--workers', default=2, show_default=True, help='Runs at the same time.')
@click.option('--threads', default=0, help="CPU threads of each.  [default: torch's]")
@click.pass_obj
def run(folder, table, shipped, hours, workers, threads):
    "Train what has not been trained yet"
    if threads: os.environ['OMP_NUM_THREADS'] = str(threads)
    jobs = what_ships() if shipped else needed([j.name for j in plan() if not table or j.table in table])
    if gone := sorted({f'{j.data}.parquet' for j in jobs if not j.data.startswith('pseudo')} - {p.name for p in folder.glob('*.parquet')}):
        click.echo(f"{folder}: no {', '.join(gone)}: their runs are left out (see prepare --help)", err=True)
        jobs = [j for j in jobs if f'{j.data}.parquet' not in gone]
    parallel_work(jobs, folder, 3600*hours, workers)

@main.command('ship')
@click.option('--out', default=str(Path(__file__).parents[1]/'ribo_nb'/'weights'), type=click.Path(path_type=Path))
@click.pass_obj
def ship_(folder, out):
    "Half-precision weights of the final runs, their ensemble and its error bars"
    groups = folder/'groups.parquet'
    if not groups.exists(): raise ValueError(f'{groups} is missing: without it the scans have no scores of their own (see prepare --help, --groups)')
    tables,rows = ship(folder, out),Store(folder/'check.parquet').rows
    here.mkdir(exist_ok=True)
    for name,t in dict(shipped=shipped_scores(tables, rows, groups), noise=by_noise(tables, rows)).items():
        with atomic(here/f'{name}.csv') as p: t.to_csv(p, index=False)
        click.echo(t.round(4).to_string(index=False) + '\n')

@main.command()
@click.pass_obj
def report(folder):
    "Results of all finished runs, beside the lookups"
    groups = folder/'groups.parquet'
    results = collect(folder, here, groups if groups.exists() else None)
    if not (here/'lookups.csv').exists(): lookups(folder).to_csv(here/'lookups.csv', index=False)  # minutes of folding by ViennaRNA
    if not (here/'floors.csv').exists() and groups.exists(): floors(folder, groups).to_csv(here/'floors.csv', index_label='part')
    errors = pd.read_parquet(here/'errors.parquet')
    for t in results.table.unique():
        if results[results.table == t].official.notna().any(): click.echo(f'\n{t}\n' + table_of(results, errors, t, 'cfg_0' if t in ('main','families','scaled') else None).to_string())
    if (results.table == 'ablation').sum() > 1: _save(plot_ablation(results, errors), here/'ablation.png')

def _save(fig, path):
    with atomic(path) as p: fig.savefig(p, dpi=120, format='png')

@main.command('speed')
@click.option('--length', default=170, show_default=True)
@click.option('--batch', default=32, show_default=True)
@click.option('--rounds', default=7, show_default=True)
def speed_(length, batch, rounds):
    "Sequences per second in training and inference, one configuration after the other, alone on the device"
    torch.set_num_threads(1)
    ways = {j.what: j.cfg for j in plan() if j.table in (('main','final') if torch.cuda.is_available() else ('scaled','final')) and j.k == 0}
    rows = {}
    for k,c in ways.items():
        rows[k] = speed(c, length, batch, rounds=rounds)
        torch._dynamo.reset()
        click.echo(f"{k}: {rows[k]['training']:.1f} sequences/s in training, {rows[k]['inference']:.1f} in inference", err=True)
    t = pd.DataFrame(rows).T.drop(columns='loss').astype(float).round(1)
    here.mkdir(exist_ok=True)
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU, one thread'
    t.assign(device=kind, length=length, batch=batch).to_csv(here/f"speed-{'gpu' if torch.cuda.is_available() else 'cpu'}.csv")
    click.echo(f'{kind}, {length} nt × {batch}\n{t.to_string()}')

if __name__ == '__main__': main()
