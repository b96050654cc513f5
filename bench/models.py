"Training steps and predictions of our models beside the published arithmetic, in one run: `python bench/models.py --help`."
import statistics,subprocess,sys,time
import click,pandas as pd,torch
from torch import nn
from published import Bare,SecondPlace
from published_ribonanzanet import published
from ribo_nb.mamba import BiMixer
from ribo_nb.ribonanzanet import RibonanzaNet
from ribo_nb.squeezeformer import toy_batch
from ribo_nb.config import build, cfgs, summary

class Literal(nn.Module):
    "RibonanzaNet as published, step for step"
    def __init__(self):
        super().__init__()
        self.net = RibonanzaNet()
    def forward(self, batch): return published(self.net, batch)

class Walks(nn.Module):
    "Nothing but our two selective walks, 12 × 256"
    def __init__(self, d=256, n=12):
        super().__init__()
        self.kind,self.head,self.mixers = nn.Embedding(5, d),nn.Linear(d, 2),nn.ModuleList(BiMixer(d, 8, 32, 7) for _ in range(n))
    def forward(self, batch):
        x = self.kind(batch['seq'])
        for m in self.mixers: x = x + m(x, batch['mask'], batch['bpp'])
        return self.head(x)

class MambaPy(nn.Module):
    "The package mambapy's parallel scan, 12 × 256, a stack for each direction"
    def __init__(self, d=256, n=12):
        super().__init__()
        from mambapy.mamba import Mamba,MambaConfig
        self.kind,self.head = nn.Embedding(5, d),nn.Linear(d, 2)
        self.left,self.right = (Mamba(MambaConfig(d_model=d, n_layers=n, d_state=16)) for _ in range(2))
    def forward(self, batch):
        x = self.kind(batch['seq'])
        return self.head(self.left(x) + self.right(x.flip(1)).flip(1))

WAYS = {k: (lambda c=c: build(c)) for k,c in cfgs.items() if k != 'cfg_demo'} | {
    'RibonanzaNet, literally': Literal, '2nd place, literally': SecondPlace, 'bare attention': Bare, 'two walks': Walks, 'mambapy': MambaPy}
RACES = { # name: ways, the first being the one that the ratios refer to, and sequences per batch
    'networks': (['cfg_0','cfg_mamba','2nd place, literally','bare attention','cfg_seed32'], 8),
    'walks': (['two walks','bare attention','mambapy'], 4),
    'ribonanzanet': (['cfg_mamba','cfg_0','cfg_ribonanzanet','RibonanzaNet, literally'], 1)}

def here(): return 'cuda' if torch.cuda.is_available() else 'cpu'

def step(model, batch, dtype=torch.float32):
    "Forward and backward"
    model.train().zero_grad()
    with torch.autocast(here(), dtype, enabled=dtype != torch.float32): pred = model(batch)
    pred.float().abs().mean().backward()

def predict(model, batch, dtype=torch.float32):
    with torch.inference_mode(), torch.autocast(here(), dtype, enabled=dtype != torch.float32): return model.eval()(batch).float()

def seconds(f, *args):
    "CPU seconds of one thread; on a GPU seconds by the clock"
    clock = time.perf_counter if here() == 'cuda' else time.process_time
    if here() == 'cuda': torch.cuda.synchronize()
    t = clock()
    f(*args)
    if here() == 'cuda': torch.cuda.synchronize()
    return clock() - t

def race(runs, rounds):
    "name → arguments of `seconds`; medians, taken in turns, and the medians of the ratios to the first"
    times = {k: [] for k in runs}
    for r in range(rounds + 1):
        for k,run in runs.items(): times[k].append(seconds(*run))
    first = next(iter(times.values()))[1:]  # the first round warms up
    return {k: (statistics.median(t[1:]), statistics.median(a/b for a,b in zip(t[1:], first, strict=True))) for k,t in times.items()}

def peak():
    "Matrix products per second that this device manages, fp32, in GFLOP"
    a = torch.randn(4096 if here() == 'cuda' else 1024, 4096 if here() == 'cuda' else 1024, device=here())
    return 2*len(a)**3/min(seconds(torch.mm, a, a) for _ in range(5))/1e9

def memory(way, l, n):
    "Peak MB of one training step beyond what stood there before, in a process of its own"
    r = subprocess.run([sys.executable, __file__, '--memory', way, '--lengths', str(l), '--batch', str(n)], capture_output=True, text=True)
    return float(r.stdout) if not r.returncode else r.stderr.strip().splitlines()[-1]

def one_step(way, l, n):
    model,batch = WAYS[way]().to(here()),{k: v.to(here()) for k,v in toy_batch((l,)*n).items()}
    if here() == 'cuda':
        base = torch.cuda.memory_allocated(); step(model, batch)
        return (torch.cuda.max_memory_allocated() - base)/2**20
    high = lambda: next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))/1024
    base = high(); step(model, batch)
    return high() - base

@click.command()
@click.option('--race', 'name', type=click.Choice([*RACES, 'precision']), multiple=True, help='[default: all]')
@click.option('--lengths', default='107,177,206,457', show_default=True, help='nt')
@click.option('--batch', type=int, help='Sequences per batch.  [default: 8; 1 where RibonanzaNet takes part]')
@click.option('--rounds', default=5, show_default=True)
@click.option('--memory', 'way', type=click.Choice(list(WAYS)), help='Print the peak MB of one step of this, and nothing else.')
def main(name, lengths, batch, rounds, way):
    torch.set_num_threads(1); torch.manual_seed(0)
    lengths = [int(l) for l in lengths.split(',')]
    if way: print(one_step(way, lengths[0], batch)); return
    top = peak()
    click.echo(f'torch {torch.__version__}, {here()}, one thread: {top:.0f} GFLOP/s in a matrix product')
    for k in name or [*RACES, 'precision']: precision(lengths, batch or 8, rounds) if k == 'precision' else training(k, lengths, batch, rounds, top)

def training(name, lengths, batch, rounds, top):
    ways,n = RACES[name]
    models = {}
    for w in ways:
        try: models[w] = WAYS[w]().to(here())
        except ImportError as e: click.echo(f'{w} left out: pip install {e.name}')
    for l in lengths:
        b = {k: v.to(here()) for k,v in toy_batch((l,)*(batch or n)).items()}
        rows = {}
        for w,(s,ratio) in race({w: (step, m, b) for w,m in models.items()}, rounds).items():
            rows[w] = {'s per sequence': round(s/len(b['seq']), 3), f'times {ways[0]}': round(ratio, 2), 'peak MB': memory(w, l, len(b['seq']))}
            if w in cfgs: rows[w]['share of matmul peak'] = f"{3*summary(cfgs[w], (l,)).loc['in all', f'GFLOP at {l} nt']*len(b['seq'])/s/top:.0%}"
        click.echo(f'\n{name}: training step, {l} nt × {len(b["seq"])}, fp32\n{pd.DataFrame(rows).T.fillna("").to_string()}')

def precision(lengths, batch, rounds):
    for name in ('cfg_0','cfg_mamba','cfg_seed32'):
        torch.manual_seed(0)
        model = build(cfgs[name]).to(here())
        for l in lengths:
            b = {k: v.to(here()) for k,v in toy_batch((l,)*batch).items()}
            kinds = [torch.float32, torch.bfloat16] + [torch.float16]*(here() == 'cuda')
            infer,train = (race({d: (f, model, b, d) for d in kinds}, rounds) for f in (predict, step))
            exact = predict(model, b)
            d = {str(d)[6:]: {'inference, times faster': 1/infer[d][1], 'training, times faster': 1/train[d][1], 'inference, s per sequence': infer[d][0]/batch,
                 'mean change of prediction': float((predict(model, b, d) - exact).abs().mean())} for d in kinds}
            click.echo(f'\n{name} (not trained): {l} nt × {batch}\n{pd.DataFrame(d).T.to_string(float_format="{:.4f}".format)}')

if __name__ == '__main__': main()
