"""The battle (bench/battle*.py): stores, runs, what ships and its scores, on SIMULATED profiles."""
import json
import time
from dataclasses import replace

import battle_ship
import numpy as np
import pandas as pd
import pytest
import torch
from battle_data import (
    LEFT_OUT,
    has_no_relative,
    joined_families,
    prepare_1m7,
    prepare_stores,
    refold,
    store_path,
    thin_scans,
)
from battle_plan import MEMBERS, Run, plan, with_beginnings, work
from battle_scores import context_lookup, difference_from_others, interval_of, rough_key
from battle_ship import scores_by_noise, ship, shipped_scores

from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore
from ribo_nb.data import MODS, Store, held_out, simulate
from ribo_nb.infer import load
from ribo_nb.config import cfgs, load_checkpoint
from ribo_nb.metric import baselines, errors, score

TINY = dict(d_model=16, n_head=2, n_layer=1, n_epoch=1, flip=False, precision='fp32', device='cpu',
            engine_params='1421e89c', batch_size=16, score_every=99)


@pytest.fixture(scope='module')
def groups(tmp_path_factory):
    path = tmp_path_factory.mktemp('groups')/'groups.parquet'
    table = simulate(90, seed=3).drop_duplicates('sequence_id')
    number = pd.Series(range(len(table)), table.index)
    table = table.assign(source='15k', family='virus ' + (number % 9).astype(str), cluster=number)
    table[['sequence_id', 'source', 'family', 'cluster']].to_parquet(path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory, groups):
    "All stores of a small battle"
    folder = tmp_path_factory.mktemp('battle')
    simulate(90, seed=3).to_parquet(folder/'raw.parquet')
    prepare_stores(folder/'raw.parquet', groups, folder)
    table = simulate(24, seed=9).assign(signal_to_noise=2.)
    table[table.experiment_type == '2A3_MaP'].to_parquet(folder/'m7.parquet')
    prepare_1m7(folder/'m7.parquet', folder)
    return folder


# ---------------------------------------------------------------- stores

def test_joined_families():
    joined = joined_families(np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 7]))
    assert joined.tolist() == [0, 0, 0, 1, 1]


def test_scans_are_thinned_and_nothing_else():
    rng = np.random.default_rng(0)
    scan = np.where(rng.random((200, 90)) < .05, 'A', list('GCUGCUGCUC'*9))
    scan = [''.join(letters) for letters in scan]
    mixed = pd.Series([*scan, *scan[:50], *simulate(30).sequence.unique()])  # fifty measured twice
    kept = thin_scans(mixed, np.repeat(['scan', 'rest'], [250, len(mixed) - 250]))
    assert mixed[:250][kept[:250]].nunique() == 30
    assert kept[250:].all()


def test_relatives_stay_away():
    rng = np.random.default_rng(0)
    a, b, c = (''.join(rng.choice(list('ACGU'), 120)) for _ in range(3))
    half = a[:70] + b[70:]
    assert has_no_relative([a, b, half, c], [a, b]).tolist() == [False, False, False, True]


def test_stores_of_one_table(folder):
    folds, check, even = (Store(store_path(folder, name)) for name in ('folds', 'check', 'even'))
    assert ((check.rows.fold == 0) == folds.rows.fold.isin([1, 2])).all()
    assert even.rows.fold.tolist() == check.rows.fold.tolist()  # no scan in it
    number = np.arange(len(folds))
    fold = np.where(number % 3, number % 2, LEFT_OUT)
    odd = Store(refold(folds, store_path(folder, 'odd'), fold, 'odd and even'))
    assert odd.rows.fold.tolist() == fold[fold != LEFT_OUT].tolist()
    assert (odd.meta['split'], odd.meta['n_fold']) == ('odd and even', 2)
    first = int(np.flatnonzero(fold != LEFT_OUT)[0])
    assert np.array_equal(odd[0][0], folds[first][0], equal_nan=True)


def test_1m7_stands_in_for_2a3(folder):
    store = Store(store_path(folder, '1M7'))
    react = np.concatenate([store[i][0] for i in range(len(store))])
    assert np.isnan(react[:, 1]).all()
    assert np.nanquantile(react[:, 0], .9) == pytest.approx(1, abs=.01)
    assert store.rows.dataset_name.str.endswith('_1M7').all()


# ---------------------------------------------------------------- runs

def test_plan_can_be_done(folder):
    runs = plan()
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)  # each has a folder of its own
    assert {run.k for run in runs if run.table == 'main'} == {0, 1, 2}
    assert all(store_path(folder, run.data).exists() for run in runs)
    for number, run in enumerate(runs):
        assert not run.start or run.start in names[:number]
    final = [run for run in runs if run.name == 'final-mamba-0']
    assert [run.name for run in with_beginnings(final)] == ['1M7_first-mamba-0', 'final-mamba-0']


@pytest.fixture(scope='module')
def small_plan():
    "Runs of what ships, small"
    runs = []
    for table, fold in (('sibling', 0), ('final', -1)):
        for what in MEMBERS:
            name = 'cfg_mamba' if what == 'mamba' else 'cfg_0'
            cfg = replace(cfgs[name], **TINY, fold=fold)
            runs.append(Run(table, what, 0, cfg, 'even'))
    return [*runs[:-1], replace(runs[-1], start=runs[0].name)]


@pytest.fixture(scope='module')
def done(folder, small_plan):
    work(small_plan, folder, time.monotonic() + 500)
    return folder


def test_work_is_done_once_and_a_failure_keeps_nobody_waiting(done, small_plan, capsys):
    files = [done/'runs'/run.name/'metrics.json' for run in small_plan]
    before = [path.stat().st_mtime_ns for path in files]
    bad = Run('toy', 'bad', 0, small_plan[0].cfg, 'no such store')
    waits = replace(bad, what='waits', start=bad.name)
    work([*small_plan, bad, waits], done, time.monotonic() + 500)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert 'toy-bad-0 FAILED' in capsys.readouterr().err
    assert 'no such store' in (done/'runs'/f'{bad.name}.failed').read_text()
    assert not (done/'runs'/waits.name).exists()
    last = small_plan[-1]
    began = json.loads((done/'runs'/last.name/'cfg.json').read_text())['cfg']['start']
    assert began.endswith(f'{last.start}/best.pt')


# ---------------------------------------------------------------- what ships

def test_ship(done, small_plan, groups, tmp_path, monkeypatch):
    "Files that `load` takes, in half precision, fitted on the siblings, and scores of each part"
    monkeypatch.setattr(battle_ship, 'plan', lambda: small_plan)
    tables = ship(done, tmp_path)
    file = json.loads((tmp_path/'ensemble.json').read_text())
    n_even = Store(store_path(done, 'even')).rows.sequence.nunique()
    assert file['data'].startswith(f'{n_even} sequences') and 'EternaBench (1M7)' in file['data']
    assert set(file['calibration']) == set(MODS) and file['flip'] is False
    assert file['fitted']['positions'] == tables['ensemble'].positions.sum()
    assert sum(member['weight'] for member in file['members']) == pytest.approx(1)
    model = load(tmp_path/'ensemble.json', device='cpu')
    assert model.seen is not None and len(model.members) == len(MEMBERS)
    for name in MEMBERS:
        saved = load_checkpoint(tmp_path/f'{name}.pt')
        kept = load_checkpoint(done/'runs'/f'final-{name}-0'/'best.pt')
        assert saved['cfg'].start == '' and saved['seen'] == kept['seen']
        assert {w.dtype for w in saved['model'].values()} <= {torch.float16, torch.int64}

    rows = Store(store_path(done, 'check')).rows
    assert list(tables) == [*MEMBERS, 'ensemble', 'lookup']
    shipped = shipped_scores(tables, rows, groups)
    whole = shipped[(shipped.part == 'all') & (shipped.who == 'ensemble')].iloc[0]
    assert whole.official_low < whole.official < whole.official_high
    assert whole.official == pytest.approx(score(tables['ensemble'])['official'])


def test_ship_without_a_table_writes_nothing(done, small_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(battle_ship, 'plan', lambda: small_plan)
    store = store_path(done, '1M7')
    store.rename(store.with_suffix('.away'))
    try:
        with pytest.raises((ValueError, OSError), match='1M7'):
            ship(done, tmp_path)
    finally:
        store.with_suffix('.away').rename(store)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- scores

def test_context_lookup_beats_a_constant(folder):
    store = Store(store_path(folder, 'folds'))
    bpp = BppStore(folder/'native', engine('native'))
    bpp.fill(store.rows.sequence)
    train = np.flatnonzero(store.rows.fold != 0)
    test = held_out(store, 0)
    sequences = store.rows.sequence.iloc[test].tolist()
    constant = baselines(store, train, sequences, bpp)['median per modifier']
    near = score(errors(context_lookup(store, train, test, bpp), store, test))
    far = score(errors(constant, store, test))
    assert near['official'] < far['official']


def test_rough_key_of_a_context():
    letters = 25*2 + 5*3 + 1  # middle nucleotide 3
    assert rough_key(np.array([(letters*8 + 6)*4 + 1])).tolist() == [3*8 + 6]


def test_difference_from_others():
    same = np.tile(np.linspace(0, 1, 8)[None, :, None], (5, 1, 2))
    assert difference_from_others(same) == pytest.approx(0)
    noisy = same.copy()
    noisy[2] += .5
    assert difference_from_others(noisy) == pytest.approx(.1)


def test_scores_by_noise():
    rising = range(10)
    rows = pd.DataFrame(dict(dataset_name='15k_a', signal_to_noise_2A3=rising,
                             signal_to_noise_DMS=rising[::-1]))
    # The first has nothing that counts.
    lookup = pd.DataFrame({'positions': [0] + [50]*9, '2A3': 5., 'DMS': np.arange(10.)})
    table = scores_by_noise(dict(lookup=lookup), rows, 3)
    assert table.signal_to_noise.tolist() == [2, 5, 8, 1, 4, 7]
    assert table.lookup.tolist() == pytest.approx([.1, .1, .1, .16, .1, .04])


def test_intervals_compare_what_differs():
    rows = []
    for what, error in (('a', 1.), ('b', 2.)):
        for k in (0, 1):
            for unit in range(20):
                own = dict.fromkeys(MODS, error + unit)
                rows.append(dict(what=what, k=k, unit=unit, positions=10) | own)
    table = pd.DataFrame(rows)
    assert interval_of(table, 'b', 'a') == pytest.approx((.1, .1, .1))  # what is common cancels
    middle, low, high = interval_of(table, 'a')
    assert low < middle < high
