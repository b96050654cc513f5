"Bad tables, killed conversions, and the real thing where it is at hand."
import csv,signal,time
import numpy as np,pandas as pd,pytest
from helpers import REAL,invoke,start
from ribo_nb.bpp import engine
from ribo_nb.convert import write_store
from ribo_nb.data import MODS,Store,epoch_batches,simulate,training_batch

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
    r = invoke('ribo_data', path, '--out', tmp_path/'out'/'store.arrow')
    assert r.exit_code == 1 and says in r.output and str(path) in r.output and ': ' in r.output
    if spoil in (spoil_letter, spoil_short, spoil_long): assert 'row 4' in r.output
    if spoil is spoil_twice: assert f'row {len(raw)+1}' in r.output and 'row 4' in r.output
    assert not list((tmp_path/'out').glob('*')) if (tmp_path/'out').exists() else True

@pytest.mark.parametrize('name,content', [('empty.csv', b''), ('empty.parquet', b''), ('text.parquet', b'not a table'), ('noise.csv', bytes(range(256))*50), ('cut.csv.gz', b'\x1f\x8b\x08\x00')])
def test_unreadable_file(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    r = invoke('ribo_data', tmp_path/name, '--out', tmp_path/'s.arrow')
    assert r.exit_code == 1 and name in r.output and not (tmp_path/'s.arrow').exists()

def test_truncated_parquet_keeps_the_old_store(raw, tmp_path):
    raw.to_parquet(tmp_path/'raw.parquet')
    assert invoke('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'s.arrow').exit_code == 0
    before = (tmp_path/'s.arrow').read_bytes()
    (tmp_path/'raw.parquet').write_bytes((tmp_path/'raw.parquet').read_bytes()[:-4000])
    r = invoke('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'s.arrow')
    assert r.exit_code == 1 and 'cut short' in r.output
    assert (tmp_path/'s.arrow').read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['raw.parquet','s.arrow']

def test_rows_in_any_order_and_either_key_name(raw, tmp_path):
    "A shuffled table whose key is called id gives the same store"
    raw.to_parquet(tmp_path/'a.parquet')
    raw.sample(frac=1, random_state=1).rename(columns={'sequence_id':'id'}).to_csv(tmp_path/'b.csv', index=False)
    for n in ('a.parquet','b.csv'): assert invoke('ribo_data', tmp_path/n, '--out', tmp_path/f'{n}.store.arrow').exit_code == 0
    a,b = (Store(tmp_path/f'{n}.store.arrow') for n in ('a.parquet','b.csv'))
    pd.testing.assert_frame_equal(a.rows, b.rows)
    for x,y in zip(a.arrays(np.arange(len(a))), b.arrays(np.arange(len(b))), strict=True): np.testing.assert_array_equal(x, y)

def test_modifiers_far_apart(raw, tmp_path):
    "All 2A3 rows first, the DMS rows backwards after them: the same store as with the two side by side"
    raw.to_parquet(tmp_path/'a.parquet')
    dms = raw.experiment_type == 'DMS_MaP'
    pd.concat([raw[~dms], raw[dms][::-1]]).to_parquet(tmp_path/'b.parquet', row_group_size=7)
    a,b = (write_store(tmp_path/f'{n}.parquet', tmp_path/f'{n}.store.arrow') for n in 'ab')
    pd.testing.assert_frame_equal(a, b)
    a,b = (Store(tmp_path/f'{n}.store.arrow') for n in 'ab')
    for x,y in zip(a.arrays(np.arange(len(a))), b.arrays(np.arange(len(b))), strict=True): np.testing.assert_array_equal(x, y)

def test_csv_dialects(raw, tmp_path):
    "CRLF, quotes, a byte order mark, NaN and NA, exponents, blank lines, no newline at the end"
    raw.to_csv(tmp_path/'a.csv', index=False)
    raw.to_csv(tmp_path/'b.csv', index=False, quoting=csv.QUOTE_ALL, lineterminator='\r\n', encoding='utf-8-sig')
    raw.to_csv(tmp_path/'c.csv', index=False, na_rep='NaN', float_format='%.9e')
    (tmp_path/'d.csv').write_text(raw.to_csv(index=False, na_rep='NA').replace('\n', '\n\n').rstrip())
    want = write_store(tmp_path/'a.csv', tmp_path/'a.store.arrow')
    for n in 'bcd':
        pd.testing.assert_frame_equal(write_store(tmp_path/f'{n}.csv', tmp_path/f'{n}.store.arrow'), want)
        got,first = Store(tmp_path/f'{n}.store.arrow'),Store(tmp_path/'a.store.arrow')
        for x,y in zip(got.arrays(np.arange(len(got))), first.arrays(np.arange(len(got))), strict=True): np.testing.assert_array_equal(x, y)

def test_killed_conversion_leaves_no_store(raw, tmp_path):
    "SIGKILL at any moment: no store; the next start succeeds and nothing else is left"
    big = pd.concat([raw.assign(sequence_id=raw.sequence_id + f'x{k}') for k in range(300)])
    big.to_parquet(tmp_path/'raw.parquet')
    (tmp_path/'out').mkdir()
    seen = set()
    for _ in range(2):
        p = start('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'out'/'s.arrow')
        while p.poll() is None and not (litter := [f.name for f in (tmp_path/'out').iterdir()]): time.sleep(.002)
        p.send_signal(signal.SIGKILL); p.communicate()
        seen |= set(litter)
        assert not (tmp_path/'out'/'s.arrow').exists()
    assert any(f.endswith('.tmp') for f in seen)
    assert invoke('ribo_data', tmp_path/'raw.parquet', '--out', tmp_path/'out'/'s.arrow').exit_code == 0
    assert [f.name for f in (tmp_path/'out').iterdir()] == ['s.arrow']

def test_batches_on_any_lengths():
    "Every row exactly once over all ranks, the budget kept, as many batches in every epoch"
    rng = np.random.default_rng(0)
    for n in (0, 1, 7, 500):
        length = rng.integers(1, 500, n)
        for world in (1, 3):
            epochs = [[epoch_batches(length, 2000, 5, e, r, world) for r in range(world)] for e in range(3)]
            assert len({len(b) for e in epochs for b in e}) == 1
            for e in epochs:
                assert sorted(np.concatenate([np.zeros(0, int), *sum(e, [])]).tolist()) == list(range(n))
                for parts in zip(*e, strict=True):
                    b = np.concatenate(parts)
                    assert len(b) == 1 or length[b].max()*len(b) <= 2000

def test_flip_twice_is_the_identity(mount):
    s = Store(mount/'store.arrow')
    rows = np.arange(20)
    a,b = training_batch(s, rows),training_batch(s, rows, flip=np.ones(20, bool))
    for k in ('seq','react','react_err'):
        for i,n in enumerate(s.length[:20]): np.testing.assert_array_equal(b[k][i,:n].flip(0), a[k][i,:n])
    for k in ('mask','sn','SN_filter'): np.testing.assert_array_equal(a[k], b[k])

@real
def test_bpp_equals_published_reference():
    "ViennaRNA in-process (2.7.2, as constraints.txt pins it) against reference matrices"
    ref = pd.read_parquet(REAL/'bpp_reference_viennarna272.parquet')
    fold = engine('vienna')
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
    assert invoke('ribo_data', src, '--out', tmp_path/'s.arrow').exit_code == 0
    s = Store(tmp_path/'s.arrow')
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
    r = invoke('ribo_data', REAL/'format'/name, '--out', tmp_path/'s.arrow')
    assert r.exit_code == 0, r.output
    s = Store(tmp_path/'s.arrow')
    assert sum(s.rows[f'signal_to_noise_{m}'].notna().sum() for m in MODS) == n
