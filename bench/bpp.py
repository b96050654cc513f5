"Folding and the BPP store beside the alternatives, in one run: `python bench/bpp.py --help`."
import os,resource,tempfile,time
from pathlib import Path
import click,numpy as np,pandas as pd,torch
from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore,sparse
from ribo_nb.data import FLANK3,FLANK5,read_table

def rounds(ways, items, n):
    "CPU seconds per item of each way, taken in turns: medians over n rounds, and of the ratios to the first way"
    t = {k: [] for k in ways}
    for _ in range(n):
        for k,f in ways.items():
            start = time.process_time()
            for x in items: f(x)
            t[k].append((time.process_time() - start)/len(items))
    first = np.array(next(iter(t.values())))
    return pd.DataFrame({k: dict(ms=1e3*np.median(v), ratio=np.median(np.array(v)/first)) for k,v in t.items()}).T

def folded(x, load=True):
    import RNA
    fc = RNA.fold_compound(x); fc.pf()
    return fc

@click.command()
@click.option('--rounds', 'n', default=5, show_default=True, help='Rounds of which the median is taken.')
@click.option('--table', type=click.Path(exists=True, path_type=Path), help='Sequences for the store: CSV or Parquet with a column `sequence`; else designs of 177 nt.')
@click.option('--params', type=click.Path(exists=True), help="EternaFold's parameters, for native.")
@click.option('--long/--no-long', default=True, help='With 457 nt.')
def main(n, table, params, long):
    torch.set_num_threads(1)
    rng,fold,vienna = np.random.default_rng(0),engine('native', params),engine('vienna')
    t = time.perf_counter(); fold('GGGAAAACCC'); compiled = time.perf_counter() - t
    click.echo(f'{os.cpu_count()} cores; native with {fold.params}\nfirst call (compiled, or loaded from the cache): {compiled:.1f} s')
    for length,k in ((107, 8), (177, 6), *([(457, 2)] if long else [])):
        seqs = [''.join(rng.choice(list('ACGU'), length)) for _ in range(k)]
        ways = {'native': lambda s: sparse(fold, s), 'ViennaRNA': folded}
        d = rounds(ways, seqs, n)
        click.echo(f'\n{length} nt, CPU ms per sequence, ratio to native\n{d.round(2).to_string()}')
    seqs = [''.join(rng.choice(list('ACGU'), 177)) for _ in range(6)]
    d = rounds({'bare pf()': folded, 'our engine, checked and packed': lambda s: sparse(vienna, s), 'tuples to numpy': lambda s: sparse_of(np.array(folded(s).bpp())),
                'np.asarray element by element': lambda s: sparse_of(np.asarray([[float(x) for x in r] for r in folded(s).bpp()]))}, seqs, n)
    click.echo(f'\nViennaRNA at 177 nt, ratio to the bare partition function\n{d.round(3).to_string()}')
    store(fold, table, n)

def sparse_of(m):
    i,j = np.nonzero(np.triu(m > 1e-3, 1))
    return i,j,m[i,j]

def store(fold, table, n):
    with tempfile.TemporaryDirectory() as d:
        seqs = read_table(table, ['sequence']).sequence.drop_duplicates().tolist() if table else designs(512)
        two = {}
        for jobs in (1, 2):
            b = BppStore(Path(d)/str(jobs), fold)
            t = time.perf_counter(); b.fill(seqs, jobs); two[jobs] = time.perf_counter() - t
        click.echo(f'\nstore: {len(seqs)} sequences, {len(seqs)/two[1]:.0f} per second with one process, {len(seqs)/two[2]:.0f} with two (×{two[1]/two[2]:.2f}, start-up of the workers included)')
        size = sum(p.stat().st_size for p in b.folder.glob('*.sqlite'))
        click.echo(f'{size/len(seqs):.0f} bytes per sequence, {size/sum(4*len(s)**2 for s in seqs):.2%} of dense float32')
        batch = (seqs*32)[:32]
        for k,s in enumerate(batch): np.save(f'{d}/{k}.npy', b([s])[0].numpy())
        w = max(map(len, batch))
        def npy(_):
            out = np.zeros((32, w, w), np.float32)
            for k,s in enumerate(batch): out[k, :len(s), :len(s)] = np.load(f'{d}/{k}.npy')
        r = rounds({'our store': lambda _: b(batch), 'a dense .npy per sequence': npy}, [0]*20, n)
        click.echo(f'reading a batch of 32 of up to {w} nt, CPU ms\n{r.round(2).to_string()}\n{32e3/r.ms.iloc[0]:.0f} sequences per second; peak RSS of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MB')

def designs(n):
    "Hairpins joined by linkers, 177 nt with Ribonanza's constant ends"
    from ribo_nb.data import _design
    rng = np.random.default_rng(1)
    return [FLANK5 + _design(rng, 177-46) + FLANK3 for _ in range(n)]

if __name__ == '__main__': main()
