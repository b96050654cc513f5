"Which data a run takes, which folder, what it says, and what happens where there is nothing to do."
import base64
import json
import os
import socket
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, TINY, invoke

from ribo_nb import bpp, bpp_store, config, convert, data, ensemble, families, infer, jobs, metric, runs, score, structure, tasks, trackers, train

ONE_EPOCH = json.loads(TINY) | dict(n_epoch=1)


def run(mount, out, *more, store='store.arrow', **overrides):
    return invoke('ribo_train', 'cfg_demo', '--data', mount/store, '--bpp', mount/'bpp', '--run', out,
                  '--overrides', json.dumps(ONE_EPOCH | overrides), *more)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A working directory without data, as a fresh clone has none"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'datamount'/'parquet').mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope='module')
def everything(mount, tmp_path_factory):
    "A finished run that held nothing out"
    out = tmp_path_factory.mktemp('runs')/'everything'
    r = run(mount, out, fold=-1)
    assert r.exit_code == 0, r.output
    return out


# ---- which data, which folder

def test_without_data_a_full_configuration_stops_and_names_the_two_commands(clone):
    r = invoke('ribo_train', 'cfg_0')
    assert r.exit_code == 1
    assert 'ribo_data train_data.csv --out datamount/parquet/train.arrow' in r.output
    assert 'ribo_bpp datamount/parquet/train.arrow' in r.output
    assert not (clone/'datamount'/'runs').exists()
    assert not list((clone/'datamount').rglob('*.parquet'))


def test_one_store_is_taken_several_are_listed_and_other_tables_do_not_count(mount, clone):
    folder = clone/'datamount'/'parquet'
    store = (mount/'store.arrow').read_bytes()
    (folder/'simulated-60.arrow').write_bytes(store)
    (folder/'raw.parquet').write_bytes((mount/'raw.parquet').read_bytes())
    (folder/'solution.parquet').write_bytes((mount/'test'/'solution.parquet').read_bytes())
    (folder/'damaged.arrow').write_bytes(store[:999])
    with pytest.raises(ValueError, match='there is no store'):
        train.choose_data('cfg_0')
    (folder/'train.arrow').write_bytes(store)
    r = invoke('ribo_train', 'cfg_0', '--dry-run')
    assert r.exit_code == 0
    assert 'training on datamount/parquet/train.arrow, the one store' in r.output
    (folder/'second.arrow').write_bytes(store)
    r = invoke('ribo_train', 'cfg_0', '--dry-run')
    assert r.exit_code == 1
    assert 'parquet/second.arrow' in r.output and 'parquet/train.arrow' in r.output
    assert 'damaged' not in r.output and 'solution' not in r.output
    assert str(train.choose_data('cfg_0', 'simulated')) == train.choose_data('cfg_demo') == 'simulated'


def test_python_says_which_data():
    "`train_run(cfg)` does not simulate in silence either"
    with pytest.raises(TypeError, match='data'):
        train.train_run(config.cfg_0)


@pytest.mark.parametrize('overrides, name', [
    ({}, 'cfg_0'), (dict(fold=1), 'cfg_0-fold1'), (dict(seed=2), 'cfg_0-seed2'),
    (dict(fold=1, seed=2), 'cfg_0-fold1-seed2'), (dict(lr=.1), 'cfg_0')])
def test_fold_and_seed_are_in_the_name_of_the_folder(clone, overrides, name):
    args = ['ribo_train', 'cfg_0', '--data', 'simulated', '--dry-run', '--overrides', json.dumps(overrides)]
    assert invoke(*args).output.strip() == f'datamount/runs/{name}'
    assert invoke(*args, '--run', 'as/it/is').output.strip() == 'as/it/is'
    own = name.replace('-fold1', '')
    assert invoke(*args, '--all-folds').output.strip() == f'datamount/runs/{own}'


def test_a_copy_of_a_run_lies_beside_it(mount, everything):
    cfg = config.make_cfg(str(everything/'cfg.json'), dict(seed=5))
    assert train.run_folder(str(everything/'cfg.json'), cfg) == everything.with_name('everything-seed5')


def test_summary_needs_no_data(clone):
    r = invoke('ribo_train', 'cfg_demo', '--summary')
    assert r.exit_code == 0 and '322310' in r.output and 'GFLOP at 177 nt' in r.output


def test_simulated_is_said_wherever_a_run_is_described(mount, everything):
    assert json.loads((everything/'metrics.json').read_text())['data'] == 'store.arrow (SIMULATED)'
    assert 'SIMULATED' in (everything/'starts.jsonl').read_text()
    assert 'SIMULATED' in runs.watch(everything)
    again = run(mount, everything, fold=-1).output
    assert 'data: store.arrow (SIMULATED)' in again and 'nothing is left to do' in again


# ---- parameters of the notebooks

KINDS = dict(cfg=str, overrides=dict, data=str, run=str, bpps=str, processes=int, hours=float)
GOOD = dict(cfg='cfg_0', overrides='{}', data='', run='', bpps='', processes=1, hours=0.)


@pytest.mark.parametrize('name, given, meant', [
    ('run', 20261127, '20261127'), ('data', 5, '5'), ('bpps', 1, '1'), ('cfg', 0, '0'),
    ('overrides', dict(lr=.1), dict(lr=.1)), ('processes', 2., 2), ('hours', 3, 3.)])
def test_a_number_that_was_meant_as_text_is_text_again(name, given, meant):
    value = train.as_declared(KINDS, GOOD | {name: given})[name]
    assert value == meant and type(value) is type(meant)


@pytest.mark.parametrize('name, given', [
    ('run', 1.1), ('run', None), ('run', True), ('data', float('nan')), ('bpps', ['a']), ('overrides', 7),
    ('processes', 'two'), ('processes', 0), ('processes', 1.5), ('processes', True), ('hours', -1.),
    ('hours', float('inf')), ('hours', '1')])
def test_a_parameter_of_the_wrong_kind_is_named(name, given):
    with pytest.raises(ValueError, match=f'parameter {name} is .*-r {name}'):
        train.as_declared(KINDS, GOOD | {name: given})


@pytest.mark.parametrize('notebook', ['04_train', '05_infer'])
def test_every_parameter_of_a_notebook_has_a_kind(notebook):
    cells = json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text())['cells']
    source = [''.join(c['source']) for c in cells]
    tagged = next(s for s, c in zip(source, cells, strict=True) if 'parameters' in c['metadata'].get('tags', []))
    names = [line.split(':')[0] for line in tagged.splitlines()]
    check = next(s for s in source if s.startswith('kinds = '))
    assert all(f'{n}=' in check.splitlines()[0] for n in names) and 'as_declared(kinds' in check


# ---- a run without a held-out fold

def test_a_run_on_everything_ends_well(mount, everything):
    assert {'best.pt', 'metrics.json', 'loss.png'} <= {p.name for p in everything.iterdir()}
    assert 'scores' not in json.loads((everything/'metrics.json').read_text())
    assert runs.watch(everything).startswith('everything: finished')
    r = invoke('ribo_score', '--runs', everything)
    assert r.exit_code == 0 and 'everything' in r.output


def test_following_a_finished_run_ends_also_in_a_terminal(everything, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.setattr(train.time, 'sleep', lambda s: pytest.fail('it waits for a run that has ended'))
    runs.follow(everything)
    assert 'finished' in capsys.readouterr().out


# ---- nothing to do, in every function that takes a list

NONE = np.empty((0, 2))
NO_ROWS = np.array([], int)


@pytest.fixture(scope='module')
def few(mount):
    class Few:
        store = data.Store(mount/'store.arrow')
        model = ensemble.Ensemble([config.build(config.make_cfg('cfg_demo', json.loads(TINY)))],
                               [config.make_cfg('cfg_demo', json.loads(TINY))])
        bpp = bpp_store.BppStore(mount/'bpp')
    Few.nothing = metric.errors([], Few.store, NO_ROWS)
    return Few


EMPTY = dict(
    epoch_batches=(lambda f: data.epoch_batches([], 1000), []),
    epoch_batches_random=(lambda f: data.epoch_batches([], 1000, 0), []),
    collate=(lambda f: list(data.collate([])['seq'].shape), [0, 0]),
    collate_with_bpp=(lambda f: list(data.collate([], f.bpp)['bpp'].shape), [0, 0, 0]),
    training_batch=(lambda f: list(data.training_batch(f.store, [], f.bpp)['react'].shape), [0, 0, 2]),
    cluster=(lambda f: families.cluster([]).tolist(), []),
    simulate=(lambda f: data.simulate(0), 'expected 1 or more'),
    length_folds=(lambda f: families.length_folds([], []), 'no rows'),
    plot_heatmap=(lambda f: data.plot_heatmap([]), 'no profiles to draw'),
    held_out=(lambda f: data.held_out(f.store, 77).tolist(), []),
    fill=(lambda f: f.bpp.fill([]), 0),
    bpp_store=(lambda f: list(f.bpp([]).shape), [0, 0, 0]),
    clean_sequences=(lambda f: bpp.clean_sequences([], 'x'), []),
    predict_sequences=(lambda f: tasks.predict_sequences(f.model, [], f.bpp), []),
    predict_rows=(lambda f: tasks.predict_rows(f.model, f.store, f.bpp, NO_ROWS), []),
    errors=(lambda f: len(f.nothing), 0),
    score=(lambda f: metric.score(f.nothing), 'no position counts'),
    score_by=(lambda f: metric.score_by(f.nothing), dict(dataset_name={}, length={})),
    fit_baselines=(lambda f: metric.fit_baselines(f.store, NO_ROWS, f.bpp), 'no rows to fit'),
    baselines=(lambda f: set(map(len, metric.baselines(f.store, np.arange(3), [], f.bpp).values())), {0}),
    plot_log=(lambda f: type(train.plot_log([])), plt.Figure),
    plot_scores=(lambda f: metric.plot_scores({}), 'no scores to draw'),
    plot_errors=(lambda f: metric.plot_errors({}), 'no scores to draw'),
    plot_pred=(lambda f: metric.plot_pred([], []), 'no profiles to draw'),
    bootstrap=(lambda f: metric.bootstrap(f.nothing), 'no position counts'),
    compare=(lambda f: runs.compare([]), 'no runs to compare'),
    report_runs=(lambda f: score.report_runs([], 'x.html'), 'no runs to compare'),
    predict=(lambda f: len(infer.predict(f.model, [], bpp=f.bpp)), 0),
    predict_structures=(lambda f: len(infer.predict(f.model, [], bpp=f.bpp, structures=True)), 0),
    by_position=(lambda f: jobs.by_position(infer.predict(f.model, [], bpp=f.bpp)).num_rows, 0),
    write_rdat=(lambda f: jobs.write_rdat(infer.predict(f.model, [], bpp=f.bpp), 'x.rdat'), 'no RNAs'),
    all_figures=(lambda f: list(infer.all_figures(infer.predict(f.model, [], bpp=f.bpp), f.bpp, {}, f.model)), []),
    mutate_and_map=(lambda f: infer.mutate_and_map(f.model, ''), 'there is no sequence'),
    plot_mutate_map=(lambda f: structure.plot_mutate_map('', []), 'no mutants to draw'),
    load=(lambda f: infer.load([]), 'no checkpoint given'),
    ensemble=(lambda f: ensemble.Ensemble([], []), 'no members'),
    error_by=(lambda f: infer.error_by([], [], []), 'no profiles'),
    fit_weights=(lambda f: score.fit_weights(np.empty((2, 0, 2)), NONE), 'no positions'),
    calibrate=(lambda f: score.calibrate(NONE, NONE, NONE), 'no positions'),
    by_similarity=(lambda f: list(structure.by_similarity([])), []),
)


@pytest.mark.parametrize('name', EMPTY)
def test_nothing_in_is_nothing_out_or_one_clear_error(few, name):
    call, expected = EMPTY[name]
    if not isinstance(expected, str):
        assert call(few) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            call(few)
    plt.close('all')


@pytest.mark.parametrize('name', ['empty.fasta', 'empty.csv', 'header.csv', 'header.parquet'])
@pytest.mark.parametrize('command', ['ribo_data', 'ribo_bpp', 'ribo_infer', 'ribo_score'])
def test_an_empty_file_is_said_by_every_command(mount, tmp_path, command, name):
    path = tmp_path/name
    table = pd.read_parquet(mount/'raw.parquet').iloc[:0]
    if 'header' not in name:
        path.write_text('')
    else:
        table.to_csv(path, index=False) if name.endswith('csv') else table.to_parquet(path, index=False)
    more = dict(ribo_bpp=(), ribo_score=(mount/'test'/'solution.parquet',), ribo_data=('--out', tmp_path/'o.arrow'),
                ribo_infer=('--out', tmp_path/'o.parquet'))[command]
    r = invoke(command, path, *more)
    assert r.exit_code == 1 and isinstance(r.exception, SystemExit), r.output
    assert name in r.output and len(r.output) < 500


# ---- one modifier

@pytest.fixture(scope='module')
def dms(mount, tmp_path_factory):
    "The DMS half of the simulated table as a store"
    d = tmp_path_factory.mktemp('dms')
    raw = pd.read_parquet(mount/'raw.parquet')
    raw[raw.experiment_type == 'DMS_MaP'].to_parquet(d/'raw.parquet', index=False)
    assert invoke('ribo_data', d/'raw.parquet', '--out', d/'store.arrow', '--folds', 2).exit_code == 0
    (d/'bpp').symlink_to(mount/'bpp')
    return d


def test_one_modifier_is_trained_and_its_score_is_named(dms, tmp_path):
    r = run(dms, tmp_path/'one')
    assert r.exit_code == 0, r.output
    assert '2A3 is missing' in r.output and 'the score is the MAE of DMS, not the official one' in r.output
    metrics = json.loads((tmp_path/'one'/'metrics.json').read_text())
    own = metrics['scores']['squeezeformer']
    assert set(own) == {'DMS', 'positions'} and len(metrics['scores']) == 4
    # by hand: the mean error over measured positions of profiles that pass
    store = data.Store(dms/'store.arrow')
    rows = data.held_out(store, 0)
    model = config.load_model(tmp_path/'one'/'best.pt')[0].eval()
    preds = tasks.predict_rows(model, store, bpp_store.BppStore(dms/'bpp'), rows)
    wrong = np.concatenate([np.abs(p - store[i][0].clip(0, 1))[:, 1] for p, i in zip(preds, rows, strict=True)
                            if store.SN_filter[i, 1]])
    assert abs(np.nanmean(wrong) - own['DMS']) < 1e-6
    assert 'held-out MAE of DMS' in runs.watch(tmp_path/'one')
    table, fig = runs.compare([tmp_path/'one'])
    assert table.official.isna().all() and abs(table['MAE of DMS'].iloc[0] - own['DMS']) < 1e-9
    assert 'MAE of DMS' in fig.axes[0].get_ylabel()
    (tmp_path/'x.fasta').write_text('>x\nGGGAAAACCC\n')
    said = invoke('ribo_infer', tmp_path/'x.fasta', '--ckpt', tmp_path/'one', '--out', tmp_path/'o.csv',
                  '--no-structure').output
    assert 'has learnt DMS only' in said


def test_a_solution_with_one_modifier_is_scored_by_it(dms, tmp_path):
    store = data.Store(dms/'store.arrow')
    data.write_holdout(store, 0, tmp_path)
    solution = pd.read_parquet(tmp_path/'solution.parquet')
    sub = pd.DataFrame(dict(id=solution.id, reactivity_DMS_MaP=np.float32(.25), reactivity_2A3_MaP=np.float32(.5)))
    sub.to_parquet(tmp_path/'sub.parquet', index=False)
    r = invoke('ribo_score', tmp_path/'sub.parquet', tmp_path/'solution.parquet', '--test',
               tmp_path/'test_sequences.csv', '--figure', tmp_path/'f.png')
    assert r.exit_code == 0 and 'this is the MAE of DMS, not the official score' in r.output
    rows = data.held_out(store, 0)
    truth = np.concatenate([store[i][0][:, 1].clip(0, 1) for i in rows if store.SN_filter[i, 1]])
    t = score.score_files([tmp_path/'sub.parquet'], tmp_path/'solution.parquet').iloc[0]
    assert abs(t['MAE of DMS'] - np.nanmean(np.abs(truth - .25))) < 1e-6
    assert t.positions == (~np.isnan(truth)).sum()


def test_modifiers_measured_on_different_rnas_are_scored_each_where_it_was_measured(mount, tmp_path):
    raw = pd.read_parquet(mount/'raw.parquet')
    half = raw.sequence.isin(raw.sequence.unique()[::2])
    raw[half == (raw.experiment_type == 'DMS_MaP')].to_parquet(tmp_path/'raw.parquet', index=False)
    convert.write_store(tmp_path/'raw.parquet', tmp_path/'store.arrow', n_fold=2)
    (tmp_path/'bpp').symlink_to(mount/'bpp')
    r = run(tmp_path, tmp_path/'r')
    assert r.exit_code == 0 and 'the MAE of 2A3 and DMS, not the official one' in r.output
    own = json.loads((tmp_path/'r'/'metrics.json').read_text())['scores']['squeezeformer']
    assert set(own) == {'2A3', 'DMS', 'positions'}


def test_positions_that_the_official_score_leaves_out_are_counted(mount):
    "DMS at A and C only, as most DMS pipelines deliver it"
    store = data.Store(mount/'store.arrow')
    whole = store.arrays

    def without_dms_at_g_and_u(rows, flip=None):
        seq, mask, react, react_err = whole(rows, flip)
        react[~np.isin(seq, [1, 2]), 1] = np.nan
        return seq, mask, react, react_err

    store.arrays = without_dms_at_g_and_u
    remark, = tasks.check_scorable(store, 0, data.held_out(store, 0))
    assert 'leaves out' in remark and 'of 2A3' in remark and 'of DMS' not in remark
    assert tasks.check_scorable(data.Store(mount/'store.arrow'), 0, data.held_out(store, 0)) == []


# ---- watch and stop

def test_watch_between_start_and_first_step_and_after_a_death(tmp_path):
    "`make watch` directly after `make train`: starting; and when that has died, why"
    out = tmp_path/'cfg_0'
    out.mkdir()
    p = subprocess.Popen(['sleep', '60'])
    (out/'papermill.pid').write_text(str(p.pid))
    (out/'papermill.log').write_text('…\nValueError: x.parquet: no such file\n')
    assert 'cfg_0: starting' in invoke('ribo_train', '--watch', out).output
    assert 'asked to end' in invoke('ribo_train', '--stop', out).output
    p.wait()
    r = invoke('ribo_train', '--watch', out)
    assert r.exit_code == 0 and 'x.parquet: no such file' in r.output
    assert 'no run has been started here' in invoke('ribo_train', '--watch', tmp_path/'other').output


def test_watch_after_stop_says_where_it_stopped(mount, tmp_path, monkeypatch):
    "Stopped before the first line of the log"
    steps = []
    agree = train.agree

    def stop_after_two(*wishes):
        if len(wishes) == 1: return agree(*wishes)
        steps.append(1)
        return [len(steps) == 2, False, False]

    monkeypatch.setattr(train, 'agree', stop_after_two)
    out = tmp_path/'r'
    with pytest.raises(train.Stopped):
        train.train_run(config.make_cfg('cfg_demo', ONE_EPOCH), mount/'store.arrow', out, mount/'bpp', brief=True)
    assert 'stopped at step 2 and saved' in runs.watch(out)
    assert 'step 2 of' in runs.watch(out)
    assert 'nothing trains here' in runs.ask_to_stop(out)


def test_watch_finds_folds_inside_and_runs_beside(tmp_path, everything):
    for name in ('cfg_0/fold0', 'cfg_0-fold1-seed2', 'cfg_0-seed3', 'cfg_0-fold-1', 'cfg_0-other', 'cfg_01'):
        (tmp_path/name).mkdir(parents=True)
        (tmp_path/name/'status.json').write_text((everything/'status.json').read_text())
    found = {str(p.relative_to(tmp_path)) for p in runs.runs_of(tmp_path/'cfg_0')}
    assert found == {'cfg_0/fold0', 'cfg_0-fold1-seed2', 'cfg_0-seed3', 'cfg_0-fold-1'}
    (tmp_path/'cfg_0-seed3'/'metrics.json').write_text((everything/'metrics.json').read_text())
    assert 'cfg_0-seed3: finished' in invoke('ribo_train', '--watch', tmp_path/'cfg_0').output


# ---- trackers

def test_both_trackers_are_installed_for_the_tests():
    import neptune
    import tensorboard
    assert neptune.__version__ and tensorboard.__version__


def track(out, tracker, lines):
    out.mkdir(exist_ok=True)
    (out/'cfg.json').write_text('{"data": {}}')
    (out/'starts.jsonl').write_text('{}\n')
    with trackers.tracking(config.make_cfg('cfg_demo', dict(tracker=tracker)), out) as tell:
        for line in lines:
            tell(line)


LINES = [dict(step=20, epoch=0, loss=.3, seconds=1.), dict(step=20, epoch=1, mae=.2, seconds=1.), dict(step=40, loss=.1)]


def test_neptune_gets_each_step_of_a_series_once(tmp_path, monkeypatch):
    monkeypatch.delenv('NEPTUNE_API_TOKEN', raising=False)
    for run_name in 'ab':
        track(tmp_path/run_name, 'neptune', LINES)
        kept = trackers.read_neptune(tmp_path/run_name)
        assert not kept.duplicated(['name', 'step']).any()
        assert kept[kept.name == 'loss'].step.tolist() == [20, 40] and 'mae' in set(kept.name)
    assert 'NEPTUNE_DATA_DIRECTORY' not in os.environ


@pytest.mark.parametrize('server', ['refuses', 'is silent', 'no token of ours'])
def test_neptune_without_its_server_keeps_the_run_and_says_where(tmp_path, monkeypatch, capsys, server):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        if server == 'is silent':
            s.listen()
        token = json.dumps(dict(api_address=f'http://127.0.0.1:{s.getsockname()[1]}')).encode()
        monkeypatch.setenv('NEPTUNE_API_TOKEN', base64.b64encode(token).decode() if 'token' not in server else 'ANONYMOUS')
        track(tmp_path/'r', 'neptune', LINES)
    assert 'loss' in set(trackers.read_neptune(tmp_path/'r').name)
    said = capsys.readouterr().err
    assert 'does not answer' in said and '/r/.neptune' in said and 'neptune sync' in said


@pytest.mark.parametrize('tracker', ['neptune', 'tensorboard'])
def test_a_missing_tracker_names_its_install_command(tmp_path, monkeypatch, capsys, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    track(tmp_path/'r', tracker, LINES)
    assert 'is not installed' in (said := capsys.readouterr().err) and 'pip install' in said and tracker in said
