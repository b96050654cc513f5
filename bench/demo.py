"The demo's stages with seconds, peak memory and sequences per second: `make bench`, or `python bench/demo.py --help`."
import json,os,subprocess,sys,tempfile,time
from pathlib import Path
import click,pandas as pd,psutil

BIN,ROOT = Path(sys.executable).parent,Path(__file__).parent.parent

def measure(*args):
    "Run a command → (seconds, peak resident MB of it and its children); its own last words when it fails"
    with tempfile.TemporaryFile('w+') as out:
        t,peak = time.perf_counter(),0
        p = subprocess.Popen([str(BIN/args[0]), *map(str, args[1:])], cwd=ROOT, stdout=out, stderr=out, env=dict(os.environ, TQDM_DISABLE='1'))
        while p.poll() is None:
            try:
                me = psutil.Process(p.pid)
                peak = max(peak, sum(q.memory_info().rss for q in [me, *me.children(recursive=True)]))
            except psutil.NoSuchProcess: pass
            time.sleep(.05)
        out.seek(0)
        if p.returncode: sys.exit(f'{args[0]} failed:\n' + out.read()[-2000:])
    return time.perf_counter() - t,peak/2**20

@click.command()
@click.option('--n', default=1000, show_default=True, help='Sequences, simulated or sampled from --data.')
@click.option('--data', type=click.Path(exists=True, path_type=Path), help="A table in Kaggle's format instead of simulated profiles.")
def main(n, data):
    "Every stage of `make demo` in an empty folder, measured from outside, start-up of Python and imports included."
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        store,test,run = d/'store.arrow',d/'test',d/'run'
        run.mkdir()
        stages = {
            'ribo_data': (*(('--sample', n, data.resolve()) if data else ('--simulate', n)), '--out', store, '--holdout', test),
            'ribo_bpp': (store, '--out', d/'bpp'),
            'papermill': ('--no-progress-bar', 'nbs/04_train.ipynb', run/'train.ipynb', '-p', 'cfg', 'cfg_demo', '-p', 'data', store, '-p', 'run', run, '-p', 'bpps', d/'bpp'),
            'ribo_infer': (test/'test_sequences.csv', '--ckpt', run, '--out', d/'sub.parquet', '--bpp', d/'bpp'),
            'ribo_score': (d/'sub.parquet', test/'solution.parquet', '--test', test/'test_sequences.csv', '--store', store, '--bpp', d/'bpp')}
        rows = {}
        for name,args in stages.items():
            s,mb = measure(name, *args)
            cfg = json.loads((run/'cfg.json').read_text())['cfg'] if name == 'papermill' else None
            fold = pd.read_parquet(store, columns=['fold']).fold
            work = (fold != 0).sum()*cfg['n_epoch'] if cfg else sum(1 for _ in open(test/'test_sequences.csv')) - 1 if name in ('ribo_infer','ribo_score') else n
            rows[name] = dict(seconds=round(s, 1), peak_MB=round(mb), sequences=int(work), per_second=round(work/s, 1))
        click.echo(f"{data.name if data else 'simulated'}, {n} sequences, {os.cpu_count()} cores\n{pd.DataFrame(rows).T.to_string()}")
        click.echo(f"total {sum(r['seconds'] for r in rows.values()):.0f} s; 'papermill' counts sequence presentations in training")

if __name__ == '__main__': main()
