"Sequences per second and peak memory of prediction, beside a plain loop as in typical competition code: `python bench/infer.py --help`."
import multiprocessing,resource,statistics,tempfile,time
from dataclasses import replace
from pathlib import Path
import click,numpy as np,pandas as pd,torch
from ribo_nb.bpp_store import BppStore
from ribo_nb.data import collate
from ribo_nb.ensemble import Ensemble
from ribo_nb.jobs import Job, Sequences, join, run_job
from ribo_nb.config import build, cfgs
from ribo_nb.tasks import predict_sequences

def plain(members, sequences, bpp, size=32, width=457):
    "Typical: one model after the other over the whole set, every batch padded to the longest RNA of the test set"
    outs = []
    for m in members:
        out = []
        with torch.inference_mode():
            for k in range(0, len(sequences), size):
                part = sequences[k:k+size]
                b = collate(part, bpp)
                l = b['mask'].shape[1]
                pad = dict(seq=(0, width-l), mask=(0, width-l), bpp=(0, width-l, 0, width-l))
                p = m({k: torch.nn.functional.pad(v, pad[k]) for k,v in b.items()}).clamp(0, 1)
                out += [x[:len(s)].numpy() for x,s in zip(p, part)]
        outs.append(out)
    return [np.mean(p, 0) for p in zip(*outs)]

def mixed(n, rng):
    "Ribonanza's test set: mean about 201 nt, most 177, some up to 457"
    return rng.choice([177, 207, 307, 357, 457], n, p=[.86, .03, .04, .03, .04])

def peak(f, *args):
    "Peak memory in MB of a function in a process of its own"
    def work(pipe):
        f(*args); pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
    here,there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=work, args=(there,))
    p.start(); got = here.recv(); p.join()
    return got

@click.command()
@click.option('--n', default=64, show_default=True, help='Sequences per round.')
@click.option('--rounds', default=5, show_default=True)
@click.option('--cfg', 'name', default='cfg_demo', show_default=True, type=click.Choice(list(cfgs)))
@click.option('--threads', default=1, show_default=True)
@click.option('--submission', type=int, help='Instead: write a submission of so many sequences of 100 nt and report the peak memory of the whole process.')
def main(n, rounds, name, threads, submission):
    "fp32; base-pair probabilities are in the store before the clock starts. Ratios are of the same round."
    torch.set_num_threads(threads)
    cfg,rng = replace(cfgs[name], device='cpu', precision='fp32'),np.random.default_rng(0)
    members = [build(replace(cfg, seed=s)).eval() for s in range(4)]
    if submission: whole(members, cfg, submission, rng); return
    rows = {}
    with tempfile.TemporaryDirectory() as d:
        bpp = BppStore(d)
        for what,lengths in {'177 nt': np.full(n, 177), '457 nt': np.full(n//4, 457), f'mix, mean {mixed(10**5, rng).mean():.0f} nt': mixed(n, rng)}.items():
            seqs = [''.join(rng.choice(list('ACGU'), l)) for l in lengths]
            bpp.fill(seqs)
            for k in (1, 4):
                ens,t = Ensemble(members[:k], [cfg]*k).eval(),{'ribo_nb': [], 'plain loop': []}
                ways = {'ribo_nb': lambda: predict_sequences(ens, seqs, bpp), 'plain loop': lambda: plain(members[:k], seqs, bpp)}
                for _ in range(rounds):
                    outs = []
                    for w,f in ways.items():
                        start = time.perf_counter(); outs.append(f()); t[w].append(time.perf_counter()-start)
                far = max(np.abs(a-b).max() for a,b in zip(*outs))
                rows[what,k] = {f'{w}, seq/s': len(seqs)/statistics.median(x) for w,x in t.items()} | dict(
                    times_faster=statistics.median(b/a for a,b in zip(*t.values())), **{f'{w}, MB': peak(f) for w,f in ways.items()}, largest_difference=far)
                click.echo(f'{what}, {k} members: {rows[what,k]}', err=True)
    click.echo(f'{name}, {threads} thread(s), median of {rounds} rounds\n{pd.DataFrame(rows).T.round(6).to_string()}')

def whole(members, cfg, n, rng):
    "A submission from file to file; BPPs are folded and forgotten"
    with tempfile.TemporaryDirectory() as d:
        with open(f'{d}/t.csv', 'w') as f:
            f.write('id_min,id_max,sequence_id,sequence\n')
            for k in range(n): f.write(f"{100*k},{100*k+99},s{k},{''.join(rng.choice(list('ACGU'), 100))}\n")
        start,seqs = time.perf_counter(),Sequences(f'{d}/t.csv')
        read = time.perf_counter()-start
        job = Job(Path(d)/'s.parquet', {}, seqs.length)
        run_job(job, Ensemble(members[:1], [cfg]).eval(), seqs)
        done = time.perf_counter()
        join(job, seqs)
        click.echo(f'{n:,} sequences: read {read:.1f} s, joined {time.perf_counter()-done:.1f} s, all {time.perf_counter()-start:.0f} s; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MB')

if __name__ == '__main__': main()
