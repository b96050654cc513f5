"The data path beside its alternatives, measured in the same run: `python bench/data.py --help`."
import os,statistics,subprocess,sys,tempfile,time
from pathlib import Path
import click,numpy as np,pandas as pd

# --- what runs in processes of its own: python bench/data.py JOB FILE ... prints seconds, rows and peak MB
def polars_alone(path):
    import polars as pl
    return lambda: len((pl.read_parquet if path.endswith('parquet') else pl.read_csv)(path))

def pandas_alone(path): return lambda: len((pd.read_parquet if path.endswith('parquet') else pd.read_csv)(path))

def ours(path):
    "Read, join and write, without the search for families"
    from ribo_nb import convert
    convert.row_families = lambda ids, start, hashes: np.unique(hashes, return_inverse=True)[1].astype(np.int32)
    return lambda: write(convert, path)

def ours_with_families(path):
    from ribo_nb import convert
    return lambda: write(convert, path)

def write(convert, path):
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as d:
        convert.write_store(path, Path(d)/'store.arrow')
        return sum(map(sum, _measured(Path(d)/'store.arrow')))

def _measured(store):
    from ribo_nb.data import Store
    rows = Store(store).rows
    return [rows[f'signal_to_noise_{m}'].notna() for m in ('2A3','DMS')]

JOBS = {f.__name__: f for f in (polars_alone, pandas_alone, ours, ours_with_families)}

def job(name, path):
    work = JOBS[name](path)
    t,c = time.perf_counter(),time.process_time()
    n = work()
    peak = next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))/1024  # ru_maxrss would count our parent
    print(time.perf_counter() - t, time.process_time() - c, n, peak)

def run(name, path):
    p = subprocess.run([sys.executable, __file__, 'job', name, str(path)], env=dict(os.environ, TQDM_DISABLE='1'), capture_output=True, text=True)
    if p.returncode: sys.exit(f'{name} failed on {path}:\n{p.stderr[-2000:]}')
    return dict(zip(('seconds','cpu','rows','MB'), map(float, p.stdout.split())))

# --- tables
def mutate(raw, k, rng):
    "A copy of a raw table whose design regions are mutated beyond recognition, under new ids"
    new = {}
    for i,s in zip(raw.sequence_id, raw.sequence):
        if i not in new:
            a = np.frombuffer(s.encode(), np.uint8).copy()
            at = rng.integers(26, len(a)-20, len(a)//4)
            a[at] = np.frombuffer(b'ACGU', np.uint8)[rng.integers(0, 4, len(at))]
            new[i] = a.tobytes().decode()
    return raw.assign(sequence=raw.sequence_id.map(new), sequence_id=raw.sequence_id.astype(str) + f'x{k}')

def write_tables(raw, n, folder):
    "Kaggle's text (3 decimals, blanks), the same gzipped, and Parquet: `n` rows, made of a table and of mutated copies"
    rng,parts,rows = np.random.default_rng(0),[],0
    while rows < n:
        part = (mutate(raw, len(parts), rng) if parts else raw).iloc[:n-rows]
        part.to_csv(folder/'raw.csv', mode='a', header=not parts, index=False, float_format='%.3f')
        parts.append(part); rows += len(part)
    pd.concat(parts).to_parquet(folder/'raw.parquet', index=False, row_group_size=50_000)
    subprocess.run(['gzip', '-1', '-k', str(folder/'raw.csv')], check=True)
    return [folder/f'raw.{s}' for s in ('csv','csv.gz','parquet')]

def conversion(paths, repeats):
    "Medians, and the median of the ratios of runs that stood next to each other"
    out = {}
    for path in paths:
        got = {name: [] for name in JOBS}
        for k in range(repeats):
            for name in JOBS:
                if k == 0 or name in ('polars_alone','ours'): got[name].append(run(name, path))
        for name,runs in got.items():
            med = {c: statistics.median(r[c] for r in runs) for c in runs[0]}
            ratio = statistics.median(a['seconds']/b['seconds'] for a,b in zip(runs, got['polars_alone']))
            out[path.name.removeprefix('raw.'),name] = dict(rows_per_s=round(med['rows']/med['seconds']), seconds=round(med['seconds'], 2), cpu_s=round(med['cpu'], 2), times_polars=round(ratio, 2), peak_MB=round(med['MB']), runs=len(runs))
    return pd.DataFrame(out).T

# --- loaders, one core
def per_row_pandas(raw, rows):
    "As in competition code: a row of the table per item, columns picked by name, a list of items stacked"
    import torch
    r,e = ([c for c in raw if c.startswith(p) and c[len(p):].isdigit()] for p in ('reactivity_','reactivity_error_'))
    for at in rows:
        items = []
        for i in at:
            row = raw.iloc[i]
            items.append((torch.tensor([' ACGU'.index(c) for c in row.sequence.ljust(len(r))]), torch.tensor(row[r].to_numpy(np.float32)), torch.tensor(row[e].to_numpy(np.float32))))
        [torch.stack(x) for x in zip(*items)]

def loaders(store_path, raw, seconds, folder):
    import torch
    from ribo_nb.data import Store,epoch_batches,training_batch
    torch.set_num_threads(1)
    store = Store(store_path)
    length,out = store.length,{}
    def rate(batches, work):
        t,n = time.perf_counter(),0
        while time.perf_counter() - t < seconds:
            for at in batches:
                work(at); n += len(at)
                if time.perf_counter() - t > seconds: break
        return round(n/(time.perf_counter() - t))
    for b in (32, 128):
        batches = epoch_batches(length, b*177, 0)
        out[f'ours, {b}×177 tokens'] = rate(batches, lambda at: training_batch(store, at))
    out['per-row pandas, 32'] = rate(np.split(np.random.default_rng(0).permutation(len(raw)), range(32, len(raw), 32)), lambda at: per_row_pandas(raw, [at]))
    out |= with_bpp(store, length, rate, folder)
    return pd.Series(out, name='sequences_per_s').to_frame()

def with_bpp(store, length, rate, folder, n=256):
    "The same with base-pair probabilities: our sparse store, and one dense .npy per sequence"
    import torch
    from ribo_nb.bpp_store import BppStore
    from ribo_nb.data import epoch_batches,training_batch
    rows = np.argsort(-length, kind='stable')[:n]
    seqs,bpps = store.rows.sequence.iloc[rows].tolist(),BppStore(folder/'bpp')
    bpps.fill(seqs)
    for i in rows: np.save(folder/f'{i}.npy', bpps([store.rows.sequence[i]])[0].float().numpy())
    batches = [rows[b] for b in epoch_batches(length[rows], 32*177, 0)]
    def dense(at):
        p = torch.zeros(len(at), *[int(length[at].max())]*2)
        for k,i in enumerate(at): p[k,:length[i],:length[i]] = torch.from_numpy(np.load(folder/f'{i}.npy'))
        training_batch(store, at, lambda s: p)
    size = sum(f.stat().st_size for f in folder.rglob('bpp/**/*') if f.is_file())/n
    return {f'ours + sparse BPP, 32 ({size:.0f} bytes per sequence)': rate(batches, lambda at: training_batch(store, at, bpps)),
            f'dense .npy BPP, 32 ({4*np.mean(length[rows]**2):.0f} bytes per sequence)': rate(batches, dense)}

@click.command()
@click.option('--rows', default=200_000, show_default=True, help='Of the raw table.')
@click.option('--raw', type=click.Path(exists=True, path_type=Path), help="Kaggle's table (Parquet) to take profiles from instead of simulated ones.")
@click.option('--repeats', default=5, show_default=True, help='Of ours and polars; the others run once.')
@click.option('--seconds', default=3., show_default=True, help='Per loader.')
def main(rows, raw, repeats, seconds):
    "Conversion and loading. Each reader has a process of its own; ours and polars take turns."
    from ribo_nb import convert,data
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        table = pd.read_parquet(raw) if raw else data.simulate(1000)
        paths = write_tables(table, rows, d)
        run('ours_with_families', paths[2])  # compiles once, so that nobody waits for that below
        click.echo(f"{raw.name if raw else 'simulated'}, {rows} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; " + ', '.join(f'{p.name} {p.stat().st_size/2**20:.0f} MB' for p in paths))
        click.echo(conversion(paths, repeats).to_string() + "\n'ours' reads, checks, joins and writes the store; the others only read")
        convert.write_store(paths[2], d/'store.arrow')
        store = data.Store(d/'store.arrow')
        click.echo(f"store: {(d/'store.arrow').stat().st_size/len(store):.0f} bytes per sequence")
        click.echo(loaders(d/'store.arrow', table, seconds, d).to_string())

if __name__ == '__main__': job(*sys.argv[2:]) if sys.argv[1:2] == ['job'] else main()
