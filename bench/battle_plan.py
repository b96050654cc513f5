"""The battle's runs: which question each answers, its configuration and data; and doing them.

Two processes on one list need no master. A lock per run says who has it, and a killed process loses
its lock; its run goes on from the checkpoint.
"""
import gc
import multiprocessing
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from battle_data import store_path
from filelock import FileLock, Timeout

from ribo_nb.squeezeformer import choices
from ribo_nb.config import Cfg, cfgs
from ribo_nb.train import train_run


@dataclass(frozen=True)
class Run:
    "One run of the battle"
    table: str  # which question it belongs to
    what: str  # whose answer it is
    k: int  # which repetition: seed, and in some tables the fold held out
    cfg: Cfg
    data: str = 'folds'  # name of a store
    start: str = ''  # name of the run whose weights it begins with

    @property
    def name(self) -> str:
        return f'{self.table}-{self.what}-{self.k}'.replace(' ', '_')


# Of every run here, on EternaFold's BPPs
FAST = dict(engine_params='1421e89c', one_each=True, graph=True, batch_size=32, score_every=99,
            save_minutes=99., warmup=.1)
TINY = dict(n_layer=4, d_model=64, batch_size=16)  # for two cores
LENGTHS = ('train short, test long', 'train long, test short')
SWAPS = ('PK50 to PK90', 'PK90 to PK50')  # train on one library, test on the other
MEMBERS = ('squeezeformer', 'mamba', 'squeezeformer-large')  # of what ships

UNCHANGED = 'all as in cfg_0'
SWITCHES = {  # ablations: name → fields that differ
    'positions: none': dict(position='none'),
    'positions: learned': dict(position='dynamic'),
    'positions: rotary': dict(position='rope'),
    'BPP: none': dict(bpp='none'),
    'BPP: as input only': dict(bpp='mix'),
    'BPP: bias, no convolution': dict(bpp='bias'),
    'weight: none': dict(weight='none'),
    'weight: SN_filter': dict(weight='SN_filter'),
    'no flips': dict(flip=False),
    'head: sigmoid': dict(head='sigmoid'),
    'no flips, sigmoid': dict(flip=False, head='sigmoid'),
    'EMA': dict(ema=.98),
    'SSM, not attention': dict(model='mamba', n_head=8),
}


def repeat(table: str, ways: dict, data: str, by_fold: bool = False) -> list:  # of Run
    "Each of `ways` (name → Cfg) with three seeds and, `by_fold`, with three folds held out"
    runs = []
    for k in range(3):
        for what, cfg in ways.items():
            cfg = replace(cfg, seed=k, fold=k) if by_fold else replace(cfg, seed=k)
            runs.append(Run(table, what, k, cfg, data))
    return runs


def contenders(n_epoch: int) -> dict:  # name → Cfg
    "The networks of the main table, all with the same presentations, the largest made smaller"
    own = {name: replace(cfg, **FAST, n_epoch=n_epoch) for name, cfg in cfgs.items()}
    # Steps with pairs are long, and starting kernels costs them little.
    with_pairs = dict(compile=True, graph=False)
    return {
        'RibonanzaNet': replace(own['cfg_ribonanzanet'], lr=1e-3, **with_pairs),
        'RibonanzaMamba, pair track': replace(own['cfg_mamba'], pair_track=True, n_layer=4,
                                              d_pair=32, **with_pairs),
        '32nd place, corrected': replace(own['cfg_seed32'], n_layer=8, d_model=192, accumulate=1,
                                         lr=1e-3),
        'cfg_mamba': own['cfg_mamba'],
        'cfg_0': own['cfg_0'],
    }


def scaled_contenders() -> dict:  # name → Cfg
    "The same at 4 × 64, all forwards and on one schedule"
    ways = {}
    for what, cfg in contenders(2).items():
        cfg = replace(cfg, **TINY, lr=2e-3, accumulate=1, flip=False)
        has_pairs = cfg.model == 'ribonanzanet' or cfg.pair_track
        ways[what] = replace(cfg, d_pair=16) if has_pairs else cfg
    return ways


def small_ones() -> dict:  # name → Cfg
    "Two that a core trains in an hour: forwards, a sigmoid at the end, much dropout"
    recipe = FAST | dict(batch_size=16, head='sigmoid', flip=False, dropout=.25, lr=3e-3)
    return {
        'squeezeformer': replace(cfgs['cfg_0'], **recipe, n_layer=6, d_model=128, compile=True),
        'mamba': replace(cfgs['cfg_mamba'], **recipe, n_layer=5, d_model=96),
    }


def what_ships() -> list:  # of Run
    """Three runs for each network that ships

    A beginning on 1M7; a sibling that has never seen folds 1 and 2, to be judged; and, on
    everything, what ships, which can no longer be judged.
    """
    networks = small_ones()
    networks['squeezeformer-large'] = replace(networks['squeezeformer'], n_layer=7, d_model=192,
                                              lr=2e-3)
    runs = []
    for what, cfg in networks.items():
        first = Run('1M7 first', what, 0, replace(cfg, fold=-1, n_epoch=3), '1M7')
        judged = replace(cfg, fold=0, n_epoch=8, weight_decay=.1)
        shipped = replace(cfg, fold=-1, n_epoch=5, weight_decay=.1)  # about as many steps
        runs += [
            first,
            Run('sibling', what, 0, judged, 'even', first.name),
            Run('final', what, 0, shipped, 'even', first.name),
        ]
    return runs


def on_gpu() -> list:  # of Run
    "The networks at full size"
    ways = {what: replace(cfg, batch_size=16) for what, cfg in contenders(3).items()}
    main = repeat('main', ways, 'library')
    return main + repeat('families', contenders(3), 'folds', by_fold=True)


def on_cpu() -> list:  # of Run
    "What two cores do in an afternoon, with networks of 4 × 64"
    small = replace(cfgs['cfg_0'], **FAST | TINY, n_epoch=4, lr=3e-3)
    forwards = replace(small, flip=False, head='sigmoid')
    switches = {name: replace(small, **fields) for name, fields in SWITCHES.items()}
    runs = repeat('ablation', {UNCHANGED: small} | switches, 'library')
    runs += repeat('scaled', scaled_contenders(), 'library')
    for fold, table in enumerate(LENGTHS):
        brief = replace(forwards, fold=fold, n_epoch=1)
        ways = {position: replace(brief, position=position) for position in choices['position']}
        runs += repeat(table, ways, 'length')
    for fold, table in enumerate(SWAPS):
        for what, cfg in small_ones().items():
            cfg = replace(cfg, fold=fold, n_epoch=12, weight_decay=.1)
            runs.append(Run(table, f'small {what}', 0, cfg, 'library'))
    first = Run('pretraining', '1M7', 0, replace(forwards, fold=-1, n_epoch=2), '1M7')
    runs.append(first)
    for k in range(3):  # to be compared with the ablation `no flips, sigmoid`
        cfg = replace(forwards, seed=k)
        runs.append(Run('more data', '1M7 first', k, cfg, 'library', first.name))
    return runs


def plan() -> list:  # of Run, in the order in which they are worth doing
    "All runs; what ships comes first, so that a plan cut short still leaves it"
    return what_ships() + on_gpu() + on_cpu()


def with_beginnings(runs: list) -> list:  # of Run, in the plan's order
    "Some runs, and those that they begin with"
    names = {run.name for run in runs} | {run.start for run in runs}
    return [run for run in plan() if run.name in names]


# Doing them

def run_folder(folder: Path, name: str) -> Path:
    return Path(folder)/'runs'/name


def is_done(folder: Path, name: str) -> bool:
    return (run_folder(folder, name)/'metrics.json').exists()


def open_runs(runs: list, folder: Path) -> list:  # of Run
    "Runs that are neither done nor failed; one whose beginning nobody will do is none of them"
    found = {}
    for run in runs:  # what a run begins with stands before it
        has_failed = (run_folder(folder, f'{run.name}.failed')).exists()
        can_begin = not run.start or run.start in found or is_done(folder, run.start)
        if can_begin and not has_failed and not is_done(folder, run.name):
            found[run.name] = run
    return list(found.values())


def train_one(run: Run, folder: Path, seconds: float):
    "One run, or what is left of it, in so many seconds"
    cfg = replace(run.cfg, time_budget=seconds/3600/.95)
    if run.start:
        cfg = replace(cfg, start=str(run_folder(folder, run.start)/'best.pt'))
    data = store_path(folder, run.data)
    train_run(cfg, data, run_folder(folder, run.name), Path(folder)/'bpp', brief=True)


def try_run(run: Run, folder: Path, end: float) -> bool:
    "False when another process has it; a failure is told and written down, and counts as a try"
    try:
        with FileLock(run_folder(folder, f'{run.name}.mine'), blocking=False):
            begin = time.monotonic()
            if not is_done(folder, run.name):
                train_one(run, folder, max(1., end - begin))
                click.echo(f'{run.name}: {time.monotonic() - begin:.0f} s', err=True)
    except Timeout:
        return False
    except Exception as error:
        run_folder(folder, f'{run.name}.failed').write_text(repr(error))
        click.echo(f'{run.name} FAILED: {error!r}', err=True)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return True


def work(runs: list, folder: Path, end: float):  # end: by time.monotonic()
    "Do runs one after the other until time is up; several processes may share the list"
    (Path(folder)/'runs').mkdir(parents=True, exist_ok=True)
    while time.monotonic() < end:
        left = open_runs(runs, folder)
        if not left: return
        ready = [run for run in left if not run.start or is_done(folder, run.start)]
        # After each one the list is made anew: what another waits for may be ready now.
        if not any(try_run(run, folder, end) for run in ready):
            time.sleep(1)


def work_in_parallel(runs: list, folder: Path, seconds: float, n_worker: int):
    "`work` in several processes: each run has its own compiler and random numbers"
    end = time.monotonic() + seconds
    for run in runs:  # another chance
        run_folder(folder, f'{run.name}.failed').unlink(missing_ok=True)
    spawn = multiprocessing.get_context('spawn')
    workers = [spawn.Process(target=work, args=(runs, folder, end)) for _ in range(n_worker)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
