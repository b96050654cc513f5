"Fit the simulator's chemistry (00_data: `_mean`, `_shape`) to real profiles: `python bench/fit_simulator.py TABLE`."
import click,numpy as np,pandas as pd
from joblib import Parallel,delayed
from pathlib import Path
from ribo_nb.data import CONTEXTS,MODS,NTS,Store,encode
from ribo_nb.data import _flexibility

@click.command()
@click.argument('store', type=click.Path(exists=True, path_type=Path))
@click.option('--n', default=1500, show_default=True, help='Measurements used, of those with signal_to_noise > 3 in both modifiers.')
def main(store, n):
    "STORE is written by ribo_data. Prints mean reactivity by modifier, context and nucleotide, and the gamma shapes."
    s = Store(store)
    good = s.rows[[f'signal_to_noise_{m}' for m in MODS]].min(axis=1) > 3
    rows = s.rows[good].sample(min(n, good.sum()), random_state=0).index
    flex = np.concatenate(Parallel(-1)(delayed(_flexibility)(s.rows.sequence[i], int(i)+1) for i in rows))
    react,err = (np.concatenate(a) for a in zip(*(s[i] for i in rows)))
    nt = np.concatenate([encode(q) for q in s.rows.sequence[rows]])
    sure,ctx = flex.max(1) >= .9,flex.argmax(1)  # positions whose context is nearly certain
    for m,mod in enumerate(MODS):
        def pick(c, k): return sure & np.isin(ctx, c) & (nt == k) & ~np.isnan(react[:,m])
        means = {c: [react[pick([i], k), m].mean() for k in range(1, 5)] for i,c in enumerate(CONTEXTS)}
        click.echo(f'{mod}: mean reactivity\n{pd.DataFrame(means, index=list(NTS)).T.round(2).to_string()}')
        for name,c in dict(paired=[0,1], unpaired=[2,3]).items():
            shapes = [(v := react[k := pick(c, j), m]).mean()**2/max(v.var() - (err[k, m]**2).mean(), 1e-9) for j in range(1, 5)]
            click.echo(f'{mod}: gamma shape, {name}: ' + ', '.join(f'{a} {x:.2f}' for a,x in zip(NTS, shapes)))

if __name__ == '__main__': main()
