"Names that are no identity, machines that share a folder, users without a home, and one bad record in thousands"
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from helpers import ROOT, invoke
from ribo_nb import ensemble, infer, kaggle, score
from ribo_nb.bpp import engine, read_sequences
from ribo_nb.bpp_store import BppStore
from ribo_nb.convert import write_store
from ribo_nb.data import Store, atomic, own_folder, simulate
from ribo_nb.ensemble import Ensemble
from ribo_nb.infer import load
from ribo_nb.jobs import Sequences
from ribo_nb.score import fit_ensemble, score_files
from ribo_nb.config import build, cfg_demo
from ribo_nb.runs import compare, watch


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
    stores = sorted((tmp_path/'datamount'/'parquet').glob('*.arrow'))
    assert [p.name for p in stores] == ['train_data.v1.arrow', 'train_data.v2.arrow']
    before = stores[0].read_bytes()
    for args in (('other/train_data.v1.csv',), ('train_data.v1.csv', '--sample', 5)):
        refused = invoke('ribo_data', *args, '--folds', 2)
        assert refused.exit_code == 1 and '--out' in refused.output, refused.output
    assert stores[0].read_bytes() == before


def test_make_keeps_versions_apart():
    "`make demo` names store, test set and submission by the whole name of the table"
    for data, name in (('raw/train_data.v1.csv', 'train_data.v1'), ('train_data.v2.csv.gz', 'train_data.v2'), ('a b/my data.parquet', 'my_data')):
        r = subprocess.run(['make', '-n', 'demo', f'DATA={data}'], cwd=ROOT, capture_output=True, text=True)
        assert f'--out datamount/parquet/{name}-1500.arrow' in r.stdout, r.stdout + r.stderr


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
    store = type('Store', (), dict(path=tmp_path/'s.arrow', meta={}))
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


def test_two_files_of_one_name_do_not_share_a_dataset(tmp_path):
    for d in 'ab':
        (tmp_path/d).mkdir()
        (tmp_path/d/'x.whl').write_text(d)
    with pytest.raises(ValueError, match='rename one'):
        kaggle.write_dataset(tmp_path/'set', 'me', 't', [tmp_path/'a'/'x.whl', tmp_path/'b'/'x.whl'])


# ---- several machines, one folder; users without name or home

def test_two_writers_of_one_file(tmp_path):
    "Writers of one file do not meet, also where both have the same process number; what a killed one left is removed"
    target = tmp_path/'x.json'
    litter = tmp_path/'.x.json.0badcafe.tmp'
    litter.write_text('left behind')
    with atomic(target) as first:
        first.write_text('first')
        with atomic(target) as second: second.write_text('second')
        assert first.read_text() == 'first' and target.read_text() == 'second'
    assert target.read_text() == 'first' and os.listdir(tmp_path) == ['x.json']
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    old = os.umask(0)
    os.umask(old)
    return old


NOBODY = """
import os, sys
from ribo_nb import convert, data
import matplotlib.pyplot
print(len(data.Store(sys.argv[1])), convert._words(4), os.environ['MPLCONFIGDIR'], os.environ['NUMBA_CACHE_DIR'])
"""


def closed_to_others():
    "The first folder on the way to this Python's packages that other users may not enter, or None"
    return next((folder for folder in Path(sys.prefix).resolve().parents if not folder.stat().st_mode & 0o001), None)


@pytest.mark.skipif(closed_to_others() is not None, reason=f'other users may not enter {closed_to_others()}')
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which('setpriv'), reason='only root can become somebody without a name')
def test_user_without_name_or_home():
    "No entry in passwd, no home, package and store read-only: what has to be written goes to a folder of this user's own"
    with tempfile.TemporaryDirectory() as d:  # pytest's folders are closed to others
        d = Path(d)
        shutil.copytree(ROOT/'ribo_nb', d/'ribo_nb', ignore=shutil.ignore_patterns('__pycache__', 'weights'))
        simulate(8, seed=1).to_parquet(d/'raw.parquet')
        write_store(d/'raw.parquet', d/'s.arrow', 2)
        (d/'tmp').mkdir()
        (d/'tmp').chmod(0o1777)
        d.chmod(0o755)
        env = dict(PATH=os.environ['PATH'], HOME='/nonexistent', TMPDIR=str(d/'tmp'), PYTHONPATH=str(d), PYTHONDONTWRITEBYTECODE='1')
        who = ['setpriv', '--reuid=12345', '--regid=12345', '--clear-groups']
        r = subprocess.run([*who, sys.executable, '-c', NOBODY, d/'s.arrow'], cwd=d, env=env, capture_output=True, text=True)
        if 'Permission denied' in r.stderr and not r.stdout: pytest.skip(f'others may not run {sys.executable}')
        own = d/'tmp'/'ribo_nb-12345'
        assert r.returncode == 0, r.stderr
        assert r.stdout.split() == [str(len(Store(d/'s.arrow'))), '9', str(own/'matplotlib'), str(own/'numba')]
        assert r.stderr.count('ribo_nb: ') == r.stderr.count('compiles is kept in') == 1 and 'atplotlib' not in r.stderr, r.stderr
        assert own.stat().st_mode & 0o777 == 0o700
        assert list(own.glob('numba/**/*.nbi'))


def test_own_folder_is_ours(tmp_path, monkeypatch):
    "A folder that is somebody else's, or a link to one, is not used"
    monkeypatch.setattr(tempfile, 'gettempdir', lambda: str(tmp_path))
    folder = own_folder()
    folder.chmod(0o777)
    assert own_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.rename(tmp_path/'elsewhere')
    folder.symlink_to(tmp_path/'elsewhere')
    with pytest.raises(ValueError, match='TMPDIR'): own_folder()


# ---- one bad record in thousands

FASTA = '>good first of all\nGGGAAACCC\n>n\nGGNAAACC\n>empty\n>good again\nGGGAAACCCA\n>long\n' + 'ACGU\n'*1300 + '>t\nacgt ACGT\n'


def left_out(path): return pd.read_csv(path).drop(columns='file').fillna('').to_records(index=False).tolist()


def test_skip_bad_predictions(tmp_path, monkeypatch):
    "`ribo_infer --skip-bad` predicts the others and lists what it left out, with reasons, beside the output"
    (tmp_path/'x.fa').write_text(FASTA)
    cfg = type(cfg_demo)(**(vars(cfg_demo) | dict(d_model=16, n_layer=1, device='cpu', precision='fp32', engine='vienna')))
    (tmp_path/'weights').write_text('')
    tiny = Ensemble([build(cfg)], [cfg], [tmp_path/'weights']).eval()
    monkeypatch.setattr(ensemble, 'load', lambda *_: tiny)
    out = tmp_path/'p.parquet'
    asked = ('ribo_infer', tmp_path/'x.fa', '--ckpt', 'tiny', '--out', out, '--no-structure')
    refused = invoke(*asked)
    assert refused.exit_code == 1 and "x.fa, record 5 (long): 5,200 nt, at most 5,000" in refused.output
    done = invoke(*asked, '--skip-bad')
    assert done.exit_code == 0 and f'4 records of {tmp_path}/x.fa left out, with reasons in {out}.skipped.csv' in done.output
    assert pd.read_parquet(out).name.tolist() == ['good', 't']
    rows = left_out(f'{out}.skipped.csv')
    assert [r[:2] for r in rows] == [(2, 'n'), (3, 'empty'), (4, 'good'), (5, 'long')]
    for row, why in zip(rows, ("'GGNAAACC'… contains", 'there is no sequence', "the name 'good' is used twice (the first is record 1)", '5,200 nt, at most 5,000'), strict=True):
        assert row[2].startswith(why)
    (tmp_path/'x.fa').write_text('>good\nGGGAAACCC\n')
    assert invoke(*asked, '--skip-bad').exit_code == 0 and not Path(f'{out}.skipped.csv').exists()
    with pytest.raises(ValueError, match='none of its 1 records can be used'):
        (tmp_path/'x.fa').write_text('>a\nNN\n')
        Sequences(tmp_path/'x.fa', skip=True)


def test_skip_bad_not_in_a_submission(tmp_path):
    "A submission that lacks rows is invalid: nothing is left out of one"
    pd.DataFrame(dict(id_min=[0, 4], id_max=[3, 7], sequence_id=['a', 'b'], sequence=['ACGU', 'ACGN'])).to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(ValueError, match='lacks rows is invalid'): Sequences(tmp_path/'t.csv', skip=True)


def test_messages_speak_of_what_is_there(tmp_path):
    "A table without names is not told of an id; a name is not called an id; FASTA has records, not rows"
    for name, table, why in (('u', dict(sequence=['ACGU', 'GG', 'ACGU']), r'row 3: this sequence is there twice \(the first is row 1\)'),
                             ('n', dict(name=['a', 'a'], sequence=['ACGU', 'GG']), r"row 2 \(a\): the name 'a' is used twice"),
                             ('b', dict(name=['a', ''], sequence=['ACGU', 'GG']), 'row 2: the name is blank')):
        for kind in ('csv', 'parquet'):
            path = tmp_path/f'{name}.{kind}'
            getattr(pd.DataFrame(table), f'to_{kind}')(path, index=False)
            with pytest.raises(ValueError, match=why): Sequences(path)
            assert len(Sequences(path, skip=True)) == len(table['sequence']) - 1
    (tmp_path/'x.fa').write_text('>\nACNU\n')
    with pytest.raises(ValueError, match=r"x.fa, record 1: 'ACNU'"): Sequences(tmp_path/'x.fa')


def test_bpp_reads_fasta(tmp_path):
    "The reader of ribo_infer, also for .fa.gz and for FASTA under another name; a table stays a table"
    with gzip.open(tmp_path/'x.fa.gz', 'wt') as f: f.write(FASTA.replace('ACGU\n'*1300, 'ACGU\n'*13).replace('\n', '\r\n'))
    (tmp_path/'x.txt').write_text('; a comment\n>a\nGGGAAACCC\n')
    (tmp_path/'y.txt').write_text('sequence\nGGGAAACCC\n')
    for name in ('x.txt', 'y.txt'): assert read_sequences(tmp_path/name) == ['GGGAAACCC']
    asked = ('ribo_bpp', tmp_path/'x.fa.gz', '--out', tmp_path/'bpp', '--engine', 'vienna')
    refused = invoke(*asked)
    assert refused.exit_code == 1 and 'x.fa.gz, record 2 (n): ' in refused.output and 'row' not in refused.output
    done = invoke(*asked, '--skip-bad')
    assert done.exit_code == 0 and '4 sequences folded' in done.output, done.output
    assert [r[0] for r in left_out(tmp_path/'bpp'/'x.fa.gz.skipped.csv')] == [2, 3]
    assert not BppStore(tmp_path/'bpp', engine('vienna')).missing(['GGGAAACCC', 'GGGAAACCCA', 'ACGUACGU'])


def test_skip_bad_in_a_raw_table(tmp_path):
    "`ribo_data --skip-bad` makes the store that the table without its bad rows would give"
    good = simulate(12, seed=3)
    bad = good.iloc[:5].copy().reset_index(drop=True)
    bad.loc[0, 'sequence'] = 'N' + bad.sequence[0][1:]
    bad.loc[1, 'sequence'] = ''
    bad.loc[2, 'experiment_type'] = 'SHAPE'
    bad.loc[4, 'sequence'] = good.sequence.iloc[-1]
    assert good.sequence_id.iloc[4] != good.sequence_id.iloc[-1]
    table = pd.concat([good, bad], ignore_index=True)  # the fourth of the bad is a second profile, the fifth another sequence
    for kind in ('csv', 'parquet'):
        getattr(table, f'to_{kind}')(tmp_path/f'raw.{kind}', index=False)
        asked = ('ribo_data', tmp_path/f'raw.{kind}', '--out', tmp_path/f'{kind}.store.arrow', '--folds', 2)
        refused = invoke(*asked)
        assert refused.exit_code == 1 and f'row {len(good)+2} (' in refused.output, refused.output
        done = invoke(*asked, '--skip-bad')
        assert done.exit_code == 0 and '5 rows of ' in done.output, done.output
        rows = left_out(tmp_path/f'{kind}.store.arrow.skipped.csv')
        assert sorted(r[0] for r in rows) == list(range(len(good)+1, len(good)+6))
    good.to_parquet(tmp_path/'good.parquet')
    write_store(tmp_path/'good.parquet', tmp_path/'s.arrow', 2)
    want = Store(tmp_path/'s.arrow')
    for kind in ('csv', 'parquet'):
        got = Store(tmp_path/f'{kind}.store.arrow')
        pd.testing.assert_frame_equal(got.rows, want.rows)
        for x, y in zip(got.arrays(np.arange(len(got))), want.arrays(np.arange(len(want))), strict=True): np.testing.assert_allclose(x, y, atol=1e-6)
