"Bad tables, killed conversions, and the real thing where it is at hand."
import signal,time
import numpy as np,pandas as pd,pytest
from helpers import REAL,invoke,start
from ribo_nb.bpp import BppStore,engine
from ribo_nb.data import MODS,Store,simulate

real = pytest.mark.skipif(not REAL.exists(), reason=f'real data not found at {REAL}')

@pytest.fixture(scope='module')
def raw(): return simulate(12, seed=7)

def spoil_letter(d): d.loc[3, 'sequence'] = d.sequence[3][:40] + 'N' + d.sequence[3][41:]
def spoil_short(d): d.loc[3, 'sequence'] = d.sequence[3][:70]
def spoil_long(d): d.loc[3, 'sequence'] = d.sequence[3]*2
def spoil_column(d): d.drop(columns='signal_to_noise', inplace=True)
def spoil_twice(d): d.loc[len(d)] = d.loc[3]
def spoil_rows(d): d.drop(index=d.index, inplace=True)

@pytest.mark.parametrize('suffix', ['parquet','csv','csv.gz'])
@pytest.mark.parametrize('spoil,says', [(spoil_letter, "contains ['N']"), (spoil_short, 'nt but reactivity_'), (spoil_long, 'reactivity columns'), (spoil_column, 'signal_to_noise'), (spoil_twice, 'has a second'), (spoil_rows, 'no rows')])
def test_bad_table(raw, tmp_path, spoil, says, suffix):
    "One line that names file, row and remedy; exit code 1; nothing left behind"
    bad = raw.copy()
    spoil(bad)
    path = tmp_path/f'bad.{suffix}'
    bad.to_parquet(path) if suffix == 'parquet' else bad.to_csv(path, index=False)
    r = invoke('ribo_data', path, '--out', tmp_path/'out'/'store.parquet')
    assert r.exit_code == 1 and says in r.output and str(path) in r.output and ': ' in r.output
    if spoil in (spoil_letter, spoil_short, spoil_long): assert 'row 4' in r.output
    if spoil is spoil_twice: assert f'row {len(raw)+1}' in r.output and 'row 4' in r.output
    assert not list((tmp_path/'out').glob('*')) if (tmp_path/'out').exists() else True

@pytest.mark.parametrize('name,content', [('empty.csv', b''), ('empty.parquet', b''), ('text.parquet', b'not a table'), ('noise.csv', bytes(range(256))*50), ('cut.csv.gz', b'\x1f\x8b\x08\x00')])
def test_unreadable_file(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    r = invoke('ribo_data', tmp_path/name, '--out', tmp_path/'s.parquet')
    assert r.exit_code == 1 and name in r.output and not (tmp_path/'s.parquet').exists()

def test_truncated_parquet_keeps_the_old_store(raw, tmp_path):
    raw.to_parquet(tmp_path/'raw.parquet')
    assert invoke('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'s.parquet').exit_code == 0
    before = (tmp_path/'s.parquet').read_bytes()
    (tmp_path/'raw.parquet').write_bytes((tmp_path/'raw.parquet').read_bytes()[:-4000])
    r = invoke('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'s.parquet')
    assert r.exit_code == 1 and 'cut short' in r.output
    assert (tmp_path/'s.parquet').read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['raw.parquet','s.parquet']

def test_rows_in_any_order_and_either_key_name(raw, tmp_path):
    "A shuffled table whose key is called id gives the same store"
    raw.to_parquet(tmp_path/'a.parquet')
    raw.sample(frac=1, random_state=1).rename(columns={'sequence_id':'id'}).to_csv(tmp_path/'b.csv', index=False)
    for n in ('a.parquet','b.csv'): assert invoke('ribo_data', tmp_path/n, '--out', tmp_path/f'{n}.store').exit_code == 0
    a,b = (Store(tmp_path/f'{n}.store') for n in ('a.parquet','b.csv'))
    pd.testing.assert_frame_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.react, b.react); np.testing.assert_array_equal(a.err, b.err)

def test_killed_folding_goes_on(mount, tmp_path):
    "SIGKILL while folding: the next start computes only what is missing, and the store equals an uninterrupted one"
    p = start('ribo_bpp', mount/'store.parquet', '--out', tmp_path)
    time.sleep(6)
    p.send_signal(signal.SIGKILL); p.communicate()
    assert invoke('ribo_bpp', mount/'store.parquet', '--out', tmp_path).exit_code == 0
    seqs = Store(mount/'store.parquet').rows.sequence.tolist()
    a,b = BppStore(tmp_path),BppStore(mount/'bpp')
    assert not a.missing(seqs) and (a(seqs) == b(seqs)).all()

@real
def test_bpp_equals_published_reference():
    "ViennaRNA in-process against 159 reference matrices"
    ref = pd.read_parquet(REAL/'bpp_reference_viennarna272.parquet')
    fold = engine('vienna')
    if fold.version != '2.7.2': pytest.skip(f'reference is ViennaRNA 2.7.2, here is {fold.version}')
    for r in ref[ref.sequence.str.len() < 180].head(12).itertuples():
        i,j,p = (np.asarray(getattr(r, c)) for c in ('i','j','p'))
        want = np.zeros((len(r.sequence),)*2)
        want[i-1, j-1] = want[j-1, i-1] = p
        got = fold(r.sequence)
        assert abs(got - want)[want > 0].max() < 1e-5

@real
def test_real_table_and_its_families(tmp_path):
    "Every real profile arrives; replicates and reference families of near-copies do not straddle folds"
    src = REAL/'ribonanza_train_data.parquet'
    assert invoke('ribo_data', src, '--out', tmp_path/'s.parquet').exit_code == 0
    s = Store(tmp_path/'s.parquet')
    d = pd.read_parquet(src, columns=['sequence_id','experiment_type','dataset_name','signal_to_noise','reactivity_0060'])
    assert s.rows.sequence_id.nunique() == d.sequence_id.nunique()
    assert sum(s.rows[f'signal_to_noise_{m}'].notna().sum() for m in MODS) == len(d)
    assert np.isclose(np.nansum([s[k][0][59] for k in range(len(s))]), d.reactivity_0060.sum(), rtol=1e-4)
    assert s.rows.groupby('sequence').fold.nunique().max() == 1
    u = s.rows.drop_duplicates('sequence')
    for n,t in u.groupby(u.sequence.str.len()):  # of 200 sequences per length: who has a copy with <= 4 mismatches in another fold?
        x,f = np.array([list(q.encode()) for q in t.sequence], np.uint8)[:, 26:-20],t.fold.to_numpy()
        pick = np.random.default_rng(0).choice(len(t), 200, replace=False)
        assert np.mean([((x != x[i]).sum(1) <= 4)[f != f[i]].any() for i in pick]) <= .02

@real
@pytest.mark.parametrize('name,n', [('train_data_sample.csv.gz', 897)])
def test_kaggle_text_format(tmp_path, name, n):
    r = invoke('ribo_data', REAL/'format'/name, '--out', tmp_path/'s.parquet')
    assert r.exit_code == 0, r.output
    s = Store(tmp_path/'s.parquet')
    assert sum(s.rows[f'signal_to_noise_{m}'].notna().sum() for m in MODS) == n
