"""What survival costs: steps of a run with checkpoints, log, tracker or EMA beside bare steps, in one run.

    python bench/train.py --help
"""
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch

from ribo_nb.bpp_store import BppStore
from ribo_nb.config import build, cfgs
from ribo_nb.data import Store
from ribo_nb.tasks import ReactivityTask
from ribo_nb.trackers import tracking
from ribo_nb.train import Position, Stepper, make_optimizer, sample_store, train

STORE = click.Path(exists=True, path_type=Path)


@click.command()
@click.option('--epochs', default=2, show_default=True, help='Epochs per round.')
@click.option('--rounds', default=5, show_default=True)
@click.option('--save-minutes', default=2., show_default=True, help='Between two checkpoints.')
@click.option('--store', type=STORE, help='A store by ribo_data instead of simulated profiles.')
def main(epochs, rounds, save_minutes, store):
    "cfg_mamba at the demo's size: 4 layers of width 64, batches of 16; fold -1, so nothing is scored."
    torch.set_num_threads(1)
    base = replace(cfgs['cfg_demo'], model='mamba', device='cpu', precision='fp32', fold=-1,
                   n_epoch=epochs, save_minutes=save_minutes)
    ways = {
        'bare': None,
        'run': base,
        'run with EMA': replace(base, ema=.999),
        'run with tensorboard': replace(base, tracker='tensorboard'),
    }
    store = Store(store or sample_store(300))
    times = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        bpp = BppStore(Path(folder)/'bpp')
        bpp.fill(store.rows.sequence)
        task = ReactivityTask(base, store, bpp, torch.device('cpu'))
        for k in range(rounds + 1):
            for name, cfg in ways.items():
                out = Path(folder)/f'{name} {k}'
                out.mkdir()
                start = time.perf_counter()
                if cfg:
                    whole_run(cfg, task, out)
                else:
                    bare_steps(base, task)
                times[name].append((time.perf_counter() - start)/(epochs*task.n_batch))
    print_table(times, task, epochs, rounds)


def bare_steps(cfg, task):
    "The same epochs without anything that survives: gradient, clip, step"
    model = build(cfg).train()
    optimizer = make_optimizer(model, cfg, 0)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    stepper = Stepper(model, task, scaler, torch.float32, record=False)
    for epoch in range(cfg.n_epoch):
        for batch in task.batches(epoch):
            stepper.gradient(batch, optimizer, Position())
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
            optimizer.step()


def whole_run(cfg, task, out):
    for name in ('cfg.json', 'starts.jsonl'):
        (out/name).write_text('{}\n')
    with tracking(cfg, out) as track:
        train(cfg, build(cfg), task, out, tell=track)


def print_table(times, task, epochs, rounds):
    "The first round of each warms up and does not count"
    rows = {}
    for name, seconds in times.items():
        ratios = [a/b for a, b in zip(seconds[1:], times['bare'][1:])]
        rows[name] = dict(ms_per_step=1e3*statistics.median(seconds[1:]),
                          times_bare=statistics.median(ratios))
    click.echo(f'{epochs*task.n_batch} steps × {rounds} rounds, one thread')
    click.echo(pd.DataFrame(rows).T.round(3).to_string())


if __name__ == '__main__':
    main()
