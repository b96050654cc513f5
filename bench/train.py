"What survival costs: steps with checkpoints, log, tracker or EMA beside bare steps, in one run: `python bench/train.py --help`."
import statistics,tempfile,time
from dataclasses import replace
from pathlib import Path
import click,pandas as pd,torch
from ribo_nb.bpp_store import BppStore
from ribo_nb.data import Store
from ribo_nb.train import Trainer,build,cfgs,record,sample_store,tracking

@click.command()
@click.option('--steps', default=60, show_default=True, help='Steps per round.')
@click.option('--rounds', default=5, show_default=True)
@click.option('--save-minutes', default=2., show_default=True, help='Between two checkpoints.')
@click.option('--tracker', default='tensorboard', show_default=True, type=click.Choice(['none','tensorboard','neptune']))
@click.option('--store', type=click.Path(exists=True, path_type=Path), help='A store by ribo_data instead of simulated profiles.')
def main(steps, rounds, save_minutes, tracker, store):
    "cfg_mamba at the demo's size: 4 layers of width 64, batches of 16."
    torch.set_num_threads(1)
    base = replace(cfgs['cfg_demo'], model='mamba', device='cpu', precision='fp32', n_epoch=1000, save_minutes=save_minutes)
    store = Store(store or sample_store(300))
    with tempfile.TemporaryDirectory() as d:
        bpp,runs,out = BppStore(Path(d)/'bpp'),{},{}
        bpp.fill(store.rows.sequence)
        for name,cfg in {'bare': base, 'EMA': replace(base, ema=.999), 'checkpoints, log, tracker': replace(base, tracker=tracker)}.items():
            (Path(d)/name).mkdir()
            runs[name] = Trainer(cfg, build(cfg), store, bpp, Path(d)/name)
        batches = [b for b,_ in zip(runs['bare'].load(0), range(steps))]
        record(base, store, Path(d))
        with tracking(replace(base, tracker=tracker), Path(d)) as sink:
            runs['checkpoints, log, tracker'].tell = sink
            times = {k: [] for k in runs}
            for _ in range(rounds + 1):
                for k,t in runs.items(): times[k].append(timed(t, batches, k.startswith('checkpoints')))
        for k,t in times.items(): out[k] = dict(ms_per_step=1e3*statistics.median(t[1:])/len(batches), times_bare=statistics.median(a/b for a,b in zip(t[1:], times['bare'][1:])))
    click.echo(f'{len(batches)} steps × {rounds} rounds, one thread, checkpoints every {save_minutes:g} min, tracker {tracker}\n{pd.DataFrame(out).T.round(3).to_string()}')

def timed(t, batches, all_):
    start = time.perf_counter()
    for b in batches:
        norm = t.step(b)
        if not all_: continue
        if t.pos.step % t.log_every == 0: t.log(t.pos.line(0., norm))
        if t.agree([])[1]: t.save()
    return time.perf_counter() - start

if __name__ == '__main__': main()
