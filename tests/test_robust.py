"Names that are no identity, machines that share a folder, users without a home, and one bad record in thousands"
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from torch import nn

from helpers import ROOT, invoke
from ribo_nb import infer, kaggle, score
from ribo_nb.data import simulate
from ribo_nb.infer import Ensemble, load
from ribo_nb.score import fit_ensemble, score_files
from ribo_nb.train import cfg_demo, compare, watch


def fake_run(folder, lr=1e-3):
    "A run folder with as much in it as a comparison reads"
    folder.mkdir(parents=True)
    (folder/'cfg.json').write_text(json.dumps(dict(cfg=dict(lr=lr), data={})))
    line = dict(step=10, epoch=1, loss=.3, seconds=60., mae=.2)
    (folder/'log.jsonl').write_text(json.dumps(line) + '\n')
    status = dict(pid=1, host='here', steps=20, sequences=100)
    (folder/'status.json').write_text(json.dumps(status))
    return folder


def test_runs_of_one_name(tmp_path, monkeypatch):
    "`--all-folds` calls its folders fold0, fold1, … for every configuration: each has a row, a curve and a part of the report"
    runs = [fake_run(tmp_path/c/'fold0', lr) for c,lr in (('cfg_demo', 1e-3), ('cfg_mamba', 2e-3))]
    table, figure = compare(runs)
    assert list(table.index) == ['cfg_demo/fold0', 'cfg_mamba/fold0']
    assert table.lr.tolist() == [1e-3, 2e-3]
    assert [line.get_label() for line in figure.axes[0].lines] == list(table.index)
    asked = [a for run in runs for a in ('--runs', run)]
    done = invoke('ribo_score', *asked, '--report', tmp_path/'r.html')
    assert done.exit_code == 0 and done.output.count('fold0') == 2, done.output
    for name in table.index: assert f'{name}: configuration' in (tmp_path/'r.html').read_text()
    twice = invoke('ribo_score', '--runs', runs[0], '--runs', f'{runs[0]}/../fold0')
    assert twice.exit_code == 1 and 'given twice' in twice.output
    monkeypatch.chdir(runs[0])
    assert list(compare(['.'])[0].index) == ['fold0']
    assert watch('.').startswith('fold0: ')


def test_stores_of_one_name(tmp_path, monkeypatch):
    "A version in a table's name stays in the store's; the store of another table is not overwritten"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'other').mkdir()
    for k, name in enumerate(('train_data.v1.csv', 'train_data.v2.csv', 'other/train_data.v1.csv')):
        simulate(8, seed=k).to_csv(name, index=False)
    for name in ('train_data.v1.csv', 'train_data.v2.csv', 'train_data.v1.csv'):
        done = invoke('ribo_data', name, '--folds', 2)
        assert done.exit_code == 0, done.output
    stores = sorted((tmp_path/'datamount'/'parquet').glob('*.parquet'))
    assert [p.name for p in stores] == ['train_data.v1.parquet', 'train_data.v2.parquet']
    before = stores[0].read_bytes()
    for args in (('other/train_data.v1.csv',), ('train_data.v1.csv', '--sample', 5)):
        refused = invoke('ribo_data', *args, '--folds', 2)
        assert refused.exit_code == 1 and '--out' in refused.output, refused.output
    assert stores[0].read_bytes() == before


def test_make_keeps_versions_apart():
    "`make demo` names store, test set and submission by the whole name of the table"
    for data, name in (('raw/train_data.v1.csv', 'train_data.v1'), ('train_data.v2.csv.gz', 'train_data.v2'), ('a b/my data.parquet', 'my_data')):
        r = subprocess.run(['make', '-n', 'demo', f'DATA={data}'], cwd=ROOT, capture_output=True, text=True)
        assert f'--out datamount/parquet/{name}-1500.parquet' in r.stdout, r.stdout + r.stderr


def test_submissions_of_one_name(tmp_path):
    "Two files called submission.parquet are two rows"
    ids = np.arange(10)
    truth = pd.DataFrame(dict(id=ids, reactivity_DMS_MaP=.5, reactivity_2A3_MaP=.5))
    truth.to_parquet(tmp_path/'solution.parquet')
    files = []
    for k, folder in enumerate('ab', 1):
        (tmp_path/folder).mkdir()
        files.append(tmp_path/folder/'submission.parquet')
        truth.assign(reactivity_2A3_MaP=.5 + k/10).to_parquet(files[-1])
    table = score_files(files, tmp_path/'solution.parquet')
    assert table['2A3'].round(3).droplevel(['group', 'value']).to_dict() == {'a/submission.parquet': .1, 'b/submission.parquet': .2}


def test_members_of_one_name(tmp_path, monkeypatch):
    "The table of a fit has a row per member; a member that is given twice is refused"
    paths = [tmp_path/c/'fold0'/'best.pt' for c in ('cfg_0', 'cfg_mamba')]
    for k, p in enumerate(paths):
        p.parent.mkdir(parents=True)
        p.write_text(f'checkpoint {k}')
    rng = np.random.default_rng(0)
    y, part = rng.random((400, 2)), np.arange(400) % 4
    preds = (y + rng.normal(0, .1, (2, 400, 2))).clip(0, 1)
    monkeypatch.setattr(score, 'out_of_fold', lambda *_: (preds, y, part, [0, 1]))
    store = type('Store', (), dict(path=tmp_path/'s.parquet', meta={}))
    model = Ensemble([nn.Identity(), nn.Identity()], [cfg_demo, cfg_demo], paths)
    scores, _, _ = fit_ensemble(model, store, tmp_path/'both.json')
    assert list(scores.index[:2]) == ['cfg_0/fold0 alone', 'cfg_mamba/fold0 alone']
    members = json.loads((tmp_path/'both.json').read_text())['members']
    assert [m['path'] for m in members] == ['cfg_0/fold0/best.pt', 'cfg_mamba/fold0/best.pt']
    with pytest.raises(ValueError, match='given twice'): load([paths[0].parent, f'{tmp_path}/x/../cfg_0/fold0'])


def test_figures_of_one_name(monkeypatch):
    "RNAs whose names differ in case or in odd characters only have files of their own"
    monkeypatch.setattr(infer, 'set_figures', lambda *_: [])
    monkeypatch.setattr(infer, 'rna_figures', lambda *_: [('profile', None)])
    class Bpp:
        def fill(self, *_, **__): pass
        def __call__(self, _): return [None]
    table = pd.DataFrame(dict(name=['a/b', 'a b', 'A/B', '../a'], sequence='ACGU'))
    names = [name.lower() for name, *_ in infer.all_figures(table, Bpp(), {})]
    assert len(set(names)) == 4 and not any('/' in n for n in names)


def test_datasets_of_one_name(tmp_path, monkeypatch):
    "A second store of one name becomes a dataset of its own at Kaggle, and both keep theirs"
    monkeypatch.chdir(tmp_path)
    stores = ['a/train.parquet', 'b/train.parquet', 'x'*60 + '1.parquet', 'x'*60 + '2.parquet']
    titles = [kaggle._data_title(s) for s in stores]
    assert titles[0] == 'ribo nb data train' and len({kaggle.slug(t) for t in titles}) == 4
    assert all(len(t) <= 50 for t in titles)
    assert [kaggle._data_title(tmp_path/s) for s in reversed(stores)] == titles[::-1]
    for d in 'ab': (tmp_path/d).mkdir(); (tmp_path/d/'x.whl').write_text(d)
    with pytest.raises(ValueError, match='rename one'): kaggle._dataset_folder(tmp_path/'set', 'me', 't', ['a/x.whl', 'b/x.whl'])
