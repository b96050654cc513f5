"Folding: engines against references and failures; the store under kills, rivals, full disks and damage."
import json,os,random,signal,subprocess,sys,threading,time
import shutil
from pathlib import Path
import joblib,numpy as np,pandas as pd,pytest,torch
from helpers import REAL,call,env,invoke,start
from ribo_nb.bpp import *
from ribo_nb.bpp_store import FILE_NAME, BppStore, store_key
from ribo_nb.data import simulate

real = pytest.mark.skipif(not REAL.exists(), reason=f'{REAL} is not here')
PARAMS = REAL.parent/'reference'/'EternaFoldParams.v1'

def records(bpps):
    "Everything in a store, by sequence hash"
    rows = bpps.db.connection.execute('select hash, pairs from bpp').fetchall()
    assert len(dict(rows)) == len(rows)  # nobody twice
    return dict(rows)

@pytest.fixture(scope='module')
def rnas(): return simulate(120, seed=8).sequence.drop_duplicates().tolist()

@real
def test_native_equals_eternafold():
    "159 sequences folded by EternaFold's own binary"
    ref,fold = pd.read_parquet(REAL/'bpp_reference_eternafold.parquet'),engine('native', PARAMS)
    ours,theirs = [],[]
    for r in ref.itertuples():
        want = np.zeros((r.length,)*2)
        want[np.asarray(r.i)-1, np.asarray(r.j)-1] = r.p
        got = np.triu(fold(r.sequence))
        use = (want > 0) | (got > 1e-4)
        ours.append(got[use]); theirs.append(want[use])
    ours,theirs = np.concatenate(ours),np.concatenate(theirs)
    assert abs(ours-theirs).max() <= 3e-3 and np.corrcoef(ours, theirs)[0,1] >= .9999

@real
def test_native_equals_published_unpaired_probabilities():
    "EternaFold and CONTRAfold 2 as EternaBench published them; CONTRAfold's differ from ours in a few RNAs, we do not know why"
    ref = pd.read_parquet(REAL/'punp_reference_eternabench_round1.parquet').head(60)
    for column,params,mean,worst in (('eternafold', PARAMS, .001, .02), ('contrafold_2', None, .01, 1)):
        fold = engine('native', params)
        d = np.concatenate([abs(1 - fold(r.sequence.replace('T', 'U')).sum(1)[np.asarray(r.seqpos)] - np.asarray(getattr(r, f'p_unp_{column}'))) for r in ref.itertuples()])
        assert np.median(d) < 1e-3 and d.mean() < mean and d.max() < worst

def test_native_at_all_lengths():
    rng,fold = np.random.default_rng(5),engine('native')
    for n in (1, 2, 5, 20, 457, 2000):
        s = ''.join(rng.choice(list('ACGU'), n))
        b = fold(s)
        assert b.shape == (n, n) and (b == b.T).all() and b.min() >= 0 and b.sum(1).max(initial=0) <= 1+1e-9
    assert fold('gggaaaaccct'.upper()).sum() > 0

def test_killed_again_and_again(mount, tmp_path):
    "SIGKILL at random moments, SIGTERM once: the store ends up as the uninterrupted one, record for record"
    kill_and_compare(mount/'store.arrow', tmp_path, 3, (3.5, 7), '--jobs', 2)

@real
def test_killed_ten_times_on_real_sequences(tmp_path):
    pd.read_parquet(REAL/'ribonanza_train_data.parquet', columns=['sequence']).drop_duplicates().to_parquet(tmp_path/'t.parquet')
    kill_and_compare(tmp_path/'t.parquet', tmp_path, 10, (5, 11))

def kill_and_compare(table, tmp_path, times, between, *more):
    rng,done = random.Random(1),[]
    for k in range(times):
        p = start('ribo_bpp', table, '--out', tmp_path/'killed', *more)
        time.sleep(rng.uniform(*between))
        p.send_signal(signal.SIGTERM if k == 1 else signal.SIGKILL); p.communicate()
        done.append(len(BppStore(tmp_path/'killed')))
    assert done == sorted(done)
    for out in ('killed','whole'):
        r = call('ribo_bpp', table, '--out', tmp_path/out)
        assert r.returncode == 0, r.stderr
    assert records(BppStore(tmp_path/'killed')) == records(BppStore(tmp_path/'whole'))

def test_two_processes_fill_one_store(mount, tmp_path):
    both = [start('ribo_bpp', mount/'store.arrow', '--out', tmp_path, '--jobs', 1) for _ in range(2)]
    for p in both: assert (p.communicate()[1] is not None) and p.returncode == 0
    assert records(BppStore(tmp_path)) == records(BppStore(mount/'bpp'))

def test_full_disk_keeps_what_is_stored(rnas, tmp_path):
    "No file may grow beyond 40 kB, as on a full disk"
    code = f'''
import resource,sys
from ribo_nb.bpp_store import BppStore
b = BppStore({str(tmp_path)!r}); b.fill({rnas[:5]!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try: b.fill({rnas!r})
except ValueError as e: print(e)
'''
    r = subprocess.run([sys.executable, '-c', code], env=env(), capture_output=True, text=True)
    assert 'what was stored before is safe' in r.stdout, r.stdout + r.stderr
    b = BppStore(tmp_path)
    assert len(b) == 5 and b.fill(rnas) == len(rnas)-5
    assert not b.missing(rnas) and b(rnas[:8]).isfinite().all()

def damaged_copies(data, rng):
    "A file cut at three places, with garbage behind it, and with a flipped bit at ten places"
    for part in (.3, .6, .95):
        yield data[:int(len(data)*part)]
    yield data + b'torn tail'
    for at in rng.integers(len(data), size=10):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)


def test_damage_is_named_and_mended(rnas, tmp_path):
    "Whatever is damaged is noticed or harmless; --repair keeps what is whole, the rest is folded again"
    table = tmp_path/'t.csv'
    pd.DataFrame(dict(sequence=rnas[:20])).to_csv(table, index=False)
    assert invoke('ribo_bpp', table, '--out', tmp_path/'b').exit_code == 0
    b = BppStore(tmp_path/'b')
    good = records(b)
    whole = b.db.path.read_bytes()
    dense = b(rnas[:20])
    n_noticed = 0
    for data in damaged_copies(whole, np.random.default_rng(3)):
        b.db.path.write_bytes(data)
        try:
            assert (BppStore(tmp_path/'b')(rnas[:20]) == dense).all()
        except ValueError as error:
            assert '--repair' in str(error) or 'no BPP yet' in str(error)
            n_noticed += 1
        assert invoke('ribo_bpp', table, '--out', tmp_path/'b', '--repair').exit_code == 0
        assert records(BppStore(tmp_path/'b')) == good
    assert n_noticed >= 3


def test_a_store_of_another_key_is_refused(rnas, tmp_path):
    b = BppStore(tmp_path)
    with b.db.transaction() as connection:
        connection.execute("update about set value = '{}' where name = 'key'")
    with pytest.raises(ValueError, match='was made with'):
        BppStore(tmp_path)


OLD = Path(__file__).parent/'old'


def test_a_store_of_version_2_opens_and_nothing_is_folded_again(tmp_path):
    "Its files were written at cc70475; afterwards they are not needed any more"
    expected = json.loads((OLD/'expected.json').read_text())
    shutil.copytree(OLD/'bpp_v2', tmp_path/'bpp')
    b = BppStore(tmp_path/'bpp')
    assert b.missing(expected['sequences']) == []
    paired = [float(b([s]).sum()) for s in expected['sequences']]
    assert paired == pytest.approx(expected['paired'], abs=1e-3)
    for name in ('key.json', 'index.bin', 'pairs.bin'):
        (b.folder/name).unlink()
    assert len(BppStore(tmp_path/'bpp')) == len(expected['sequences'])


def test_a_damaged_store_of_version_2_gives_what_is_whole(tmp_path):
    expected = json.loads((OLD/'expected.json').read_text())
    shutil.copytree(OLD/'bpp_v2', tmp_path/'bpp')
    pairs = next((tmp_path/'bpp').glob('*/pairs.bin'))
    data = bytearray(pairs.read_bytes())
    data[45] ^= 4
    pairs.write_bytes(data)
    assert len(BppStore(tmp_path/'bpp').missing(expected['sequences'])) == 1


@pytest.mark.skipif(os.getuid() != 0, reason='needs root, to become somebody else')
def test_a_store_in_a_folder_that_cannot_be_written(rnas, tmp_path):
    "As Kaggle's input: it is read, and filling it says what to do"
    BppStore(tmp_path/'b').fill(rnas[:4])
    for path in (tmp_path, *tmp_path.rglob('*')):
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = f'''
import os
from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore
native = engine('native')  # all is read before it becomes somebody else, to whom this clone may be closed
warm = BppStore(engine=native)
warm.fill(['GGGAAACCC'], quiet=True)
warm(['GGGAAACCC'])
os.setuid(12345)
b = BppStore({str(tmp_path/'b')!r}, native)
print(b({rnas[:4]!r}).shape[0])
try: b.fill(['GGGAAACCCAAA'], quiet=True)
except ValueError as error: print(error)
'''
    for folder in (p for p in tmp_path.parents if 'pytest-' in str(p)):
        folder.chmod(0o755)
    try:
        r = subprocess.run([sys.executable, '-c', code], env=env(), capture_output=True, text=True)
    finally:
        for path in (tmp_path, *tmp_path.rglob('*')):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert r.stdout.startswith('4') and 'see that the folder may be written' in r.stdout, r.stdout + r.stderr


def test_a_connection_does_not_cross_a_fork(rnas, tmp_path):
    "A child that was forked off reads and writes by a connection of its own; the parent's goes on"
    b = BppStore(tmp_path)
    b.fill(rnas[:4], n_jobs=1, quiet=True)
    child = os.fork()
    if not child:
        code = 1
        torch.set_num_threads(1)  # OpenMP's threads do not cross a fork: the child would wait for them for ever
        try:
            b.fill(rnas[4:8], n_jobs=1, quiet=True)
            code = int(b(rnas[:8]).shape[0] != 8)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    b.fill(rnas[8:12], n_jobs=1, quiet=True)
    assert b.missing(rnas[:12]) == [] and len(b) == 12


class Moody(Native):
    "Talks nonsense on a run of U, refuses a run of C"
    name = 'moody'

    def pairs(self, sequence, threshold=0.):
        if sequence.startswith('CCCCC'):
            raise ValueError('cannot fold this')
        i, j, p = super().pairs(sequence, threshold)
        return (i, j, p + 1.) if sequence.startswith('UUUUU') else (i, j, p)


def test_one_bad_sequence_never_stops_the_rest(rnas, tmp_path):
    bad = [f'{letter*5}GGGGAAAACCCC' for letter in 'UC']
    b = BppStore(tmp_path, Moody())
    with pytest.raises(ValueError, match='2 of 22 sequences have no BPP'):
        b.fill(rnas[:20] + bad, quiet=True)
    assert set(b.failed) == set(bad) and len(b) == 20
    assert 'moody 1 returned probabilities from' in b.failed[bad[0]] and 'cannot fold this' in b.failed[bad[1]]


def test_vienna_folds_in_processes(tmp_path):
    "Python's lock would let its threads wait for each other; the result is that of one process"
    rng = np.random.default_rng(0)
    rnas = [''.join(rng.choice(list('ACGU'), 120)) for _ in range(90)]
    for jobs in (1, 2):
        BppStore(tmp_path/str(jobs), engine('vienna')).fill(rnas, jobs, quiet=True)
    one, two = (records(BppStore(tmp_path/str(jobs), engine('vienna'))) for jobs in (1, 2))
    assert one == two and len(one) == 90


@pytest.mark.filterwarnings('ignore')
def test_dask_cluster_with_a_worker_killed(rnas, tmp_path):
    "The same call on two Dask workers; one is killed on the way; nothing is lost, nobody is stored twice"
    distributed = pytest.importorskip('distributed')
    slow = Slow()
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        import threading
        def kill():
            while not len(b): time.sleep(.05)
            os.kill(list(client.run(os.getpid).values())[0], signal.SIGKILL)
        b = BppStore(tmp_path/'a', slow)
        t = threading.Thread(target=kill, daemon=True); t.start()
        with joblib.parallel_config('dask'): assert b.fill(rnas, n_jobs=2) == len(rnas)
        t.join(10); assert not t.is_alive()
    c = BppStore(tmp_path/'b', engine('native')); c.fill(rnas)
    assert records(b) == records(c)

class Slow(Native):
    "Native with the weight of a slower engine, so that there is time to kill somebody"
    name = 'slow'
    def pairs(self, s, threshold=0.): time.sleep(.02); return super().pairs(s, threshold)
    @staticmethod
    def seconds(n): return .1

def test_one_thread_reads_while_another_fills(tmp_path):
    "Prediction on a GPU folds the next block meanwhile: what is there stays findable at every moment"
    store,rng = BppStore(tmp_path),np.random.default_rng(0)
    seqs = [''.join(rng.choice(list('ACGU'), 12)) for _ in range(1600)]
    store.fill(seqs[:1000], quiet=True)
    def more():
        for k in range(1000, 1600, 20): store.fill(seqs[k:k+20], n_jobs=1, quiet=True)
    t = threading.Thread(target=more); t.start()
    looks = 0
    while t.is_alive(): assert not store.missing(seqs[:1000]); looks += 1
    t.join()
    assert looks > 10 and not store.missing(seqs)
