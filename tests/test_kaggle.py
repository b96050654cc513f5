"The real Kaggle client against a server of our own; and the kernel, executed."
import io,json,os,re,shutil,subprocess,sys,time,venv,zipfile
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
import pandas as pd,pytest,torch
from helpers import BIN,ROOT,TINY,env,invoke
from kaggle_stub import KEY,TOKEN,Stub
import ribo_nb.kaggle as K

@pytest.fixture
def stub(tmp_path, monkeypatch, wheel):
    "A project folder, an account, and the server that the client takes for Kaggle"
    s,p = Stub(),tmp_path/'project'
    p.mkdir(); (tmp_path/'home').mkdir()
    for n in ('settings.ini','setup.py','README.md','nbs','ribo_nb'): (p/n).symlink_to(ROOT/n)
    for k,v in dict(KAGGLE_API_ENVIRONMENT='LOCALHOST', http_proxy=s.url, HTTP_PROXY=s.url, no_proxy='', NO_PROXY='', KAGGLE_USERNAME='someone', KAGGLE_KEY=KEY,
                    HOME=str(tmp_path/'home'), KAGGLE_CONFIG_DIR=str(tmp_path/'home')).items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv('KAGGLE_API_TOKEN', raising=False)
    monkeypatch.chdir(p)
    monkeypatch.setattr(K, 'PAUSE', .02)
    real = K.build_wheel
    monkeypatch.setattr(K, 'build_wheel', lambda folder, root=None: real(folder, root) if os.environ.get('REAL_WHEEL') else _copy(wheel, folder))
    s.project,s.extra = p,tmp_path/'extra-1-py3-none-any.whl'
    extra(s.extra, 1)
    yield s
    for f in tmp_path.rglob('*'):  # no secret on disk, nor in anything sent but where the client itself puts it
        if f.is_file(): assert KEY.encode() not in f.read_bytes() and TOKEN.encode() not in f.read_bytes(), f
    for r in s.seen:
        assert KEY.encode() not in r.body and (TOKEN.encode() not in r.body or r.name == 'IntrospectToken'), r.path
        assert not any(KEY in v or TOKEN in v for k,v in r.headers.items() if k != 'Authorization') and KEY not in r.path and TOKEN not in r.path
    s.server.shutdown(); s.server.server_close()

def extra(path, number):
    "A wheel that the image lacks"
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('extra.py', f'number = {number}\n')
        z.writestr('extra-1.dist-info/METADATA', 'Metadata-Version: 2.1\nName: extra\nVersion: 1\n')
        z.writestr('extra-1.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('extra-1.dist-info/RECORD', 'extra.py,,\nextra-1.dist-info/METADATA,,\nextra-1.dist-info/WHEEL,,\nextra-1.dist-info/RECORD,,\n')

def _copy(wheel, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(wheel, folder))

@pytest.fixture(scope='session')
def wheel(tmp_path_factory): return K.build_wheel(tmp_path_factory.mktemp('wheel'), ROOT)

def kaggle(*args): return invoke('ribo_kaggle', *args)

def push(stub, *more, ok=True):
    r = kaggle('push', 'cfg_demo', '--wheel', stub.extra, *more)
    assert (r.exit_code == 0) == ok, r.output
    assert not isinstance(r.exception, (AssertionError, AttributeError, TypeError, KeyError)), r.exception
    return r.output

def nonce(stub, ref='someone/ribo-nb-cfg-demo', version=-1): return re.search(r"'nonce': '(\w+)'", stub.kernels[ref][version]['text'])[1]

def data_set(stub):
    "The data set of the store: its name ends in a hash of the store's path"
    return next(ref for ref in stub.datasets if re.fullmatch(r'someone/ribo-nb-data-store-[0-9a-f]{6}', ref))

def leave(stub, step=7, finished=False, **files):
    "The session's output"
    run = re.search(r"'run': '(\w+)'", stub.kernels['someone/ribo-nb-cfg-demo'][-1]['text'])[1]
    stub.outputs = {f'run/{k}': v for k,v in files.items()} | {'ribo.json': json.dumps(dict(ribo_kaggle=1, nonce=nonce(stub), run=run, cfg='cfg_demo', step=step, finished=finished)).encode()}

def test_push(stub, mount, wheel):
    "Private datasets, a kernel without internet on T4s; what did not change is not sent again"
    out = push(stub, '--data', mount/'store.arrow', '--bpp', mount/'bpp')
    assert 'version 1 runs' in out and 'ribo_kaggle continue cfg_demo' in out
    data = data_set(stub)
    assert set(stub.datasets) == {'someone/ribo-nb-code', data}
    assert stub.datasets['someone/ribo-nb-code'] == [{wheel.name: wheel.read_bytes(), 'extra-1-py3-none-any.whl': stub.extra.read_bytes()}]
    # The store, and whatever lies in the folder of its BPPs.
    pairs = {p.name for p in (mount/'bpp').glob('*/[!.]*') if p.stat().st_size}
    assert pairs and set(stub.datasets[data][0]) == {'store.arrow'} | pairs
    k, = stub.kernels['someone/ribo-nb-cfg-demo']
    assert (k['machineShape'], k['enableInternet'], k['isPrivate'], k['newTitle']) == ('NvidiaTeslaT4', False, True, 'ribo nb cfg demo')
    assert k['datasetDataSources'] == ['someone/ribo-nb-code', data] and not k.get('competitionDataSources')
    stub.status = 'RUNNING'
    assert 'is running' in push(stub, ok=False)
    push(stub, '--force')
    assert [len(v) for v in stub.datasets.values()] == [1, 1] and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 2
    assert stub.kernels['someone/ribo-nb-cfg-demo'][1]['competitionDataSources'] == [K.COMPETITION]
    extra(stub.extra, 2)
    push(stub, '--force')
    assert [len(v) for v in stub.datasets.values()] == [2, 1]

def test_two_stores_of_one_name_are_two_data_sets(stub, mount, tmp_path):
    for folder in ('a', 'b'):
        (tmp_path/folder).mkdir()
        shutil.copy(mount/'store.arrow', tmp_path/folder/'store.arrow')
        push(stub, '--data', tmp_path/folder/'store.arrow', '--force')
    assert len([ref for ref in stub.datasets if 'data-store' in ref]) == 2


def test_a_new_version_whose_answer_is_lost_is_not_made_twice(stub):
    push(stub)
    extra(stub.extra, 2)
    stub.fail('CreateDatasetVersion', 'cut after')
    push(stub, '--force')
    assert len(stub.datasets['someone/ribo-nb-code']) == 2


@pytest.mark.parametrize('what', ['GetDataset','StartBlobUpload','blob','CreateDataset','GetDatasetStatus','SaveKernel'])
def test_trouble_on_the_way_is_not_trouble(stub, what):
    "Busy, broken, slow, cut before and after: one dataset, one version, one kernel"
    faults = ['slow', 'cut'] if what == 'blob' else [429, 500, 'slow', 'cut', 'cut after']
    for k,fault in enumerate(faults):
        stub.datasets.clear(); stub.kernels.clear(); shutil.rmtree(stub.project/'datamount', ignore_errors=True)
        extra(stub.extra, k)
        stub.fail(what, fault)
        push(stub)
        assert not stub.faults and [len(v) for v in (*stub.datasets.values(), *stub.kernels.values())] == [1, 1], fault
        assert len(stub.datasets['someone/ribo-nb-code'][0]) == 2

@pytest.mark.parametrize('fault,says', [(401, 'make a new token'), (403, 'verified phone number'), (404, 'does not exist'), ('error', 'Maximum weekly GPU quota'), ('source', 'accept the competition'), ('silent', 'no version number')])
def test_refused_push_is_an_error_with_a_remedy(stub, fault, says):
    "Also where the client would print it and exit with 0"
    if isinstance(fault, int): stub.fail('SaveKernel', fault)
    else: stub.save = dict(error=dict(error='Maximum weekly GPU quota of 30.00 hours reached.'), source=dict(invalidCompetitionSources=[K.COMPETITION]), silent=dict(versionNumber=0))[fault]
    assert says in push(stub, ok=False)
    if not stub.kernels: assert not K.settled(K.client(), 'cfg_demo') and 'nothing was pushed' in kaggle('continue', 'cfg_demo').output

def test_kaggle_stays_down(stub):
    stub.fail('SaveKernel', *[500]*20)
    assert 'run the same command later' in push(stub, ok=False)
    stub.faults.clear()
    stub.fail('SaveKernel', *['cut']*20)
    assert 'run the same command again' in push(stub, ok=False)
    stub.faults.clear()
    push(stub)
    assert [len(v) for v in (*stub.datasets.values(), *stub.kernels.values())] == [1, 1]

def test_a_version_that_is_not_ready_is_waited_for(stub, monkeypatch):
    stub.polls_until_ready = 4
    push(stub)
    assert stub.names().index('SaveKernel') > max(i for i,n in enumerate(stub.names()) if n == 'GetDatasetStatus') and stub.names().count('GetDatasetStatus') > 4
    extra(stub.extra, 2)
    stub.polls_until_ready,patience = 10**6,K.wait_ready.__defaults__
    monkeypatch.setattr(K.wait_ready, '__defaults__', (.2, *patience[1:]))
    assert 'is not ready after' in push(stub, '--force', ok=False)
    stub.need = 0
    push(stub, '--force')  # waits for the version that is under way, and makes no third
    assert len(stub.datasets['someone/ribo-nb-code']) == 2 and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 2

def test_an_answer_that_is_lost_for_good_is_looked_for_next_time(stub):
    "The kernel was saved, the line stayed dead: the next command finds it, and starts no second one"
    stub.fail('SaveKernel', 'cut after')
    stub.fail('GetKernel', None, *['cut']*40)  # the first look finds nothing, later ones do not get through
    assert 'run the same command again' in push(stub, ok=False)
    stub.faults.clear(); stub.status = 'RUNNING'
    assert 'version 1 is running' in push(stub, ok=False) and 'version 1' in kaggle('status', 'cfg_demo').output
    stub.status = 'COMPLETE'; leave(stub, 5)
    stub.fail('SaveKernel', 'cut after')
    stub.fail('GetKernel', None, *['cut']*40)  # the first look finds nothing, later ones do not get through
    assert kaggle('continue', 'cfg_demo').exit_code == 1
    stub.faults.clear(); leave(stub, 9)
    assert 'step 9, not done' in kaggle('status', 'cfg_demo').output and 'from step 9' in kaggle('continue', 'cfg_demo').output
    assert len(stub.kernels['someone/ribo-nb-cfg-demo']) == 3
    stub.fail('ListKernelSessionOutput', *[500]*40)  # trouble is not "the run is done"
    assert 'begins anew' in push(stub, ok=False) and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 3

def test_a_dataset_that_vanished_or_failed_is_sent_again(stub, monkeypatch):
    push(stub); stub.datasets.clear()
    push(stub, '--force')
    assert [len(v) for v in stub.datasets.values()] == [1]
    extra(stub.extra, 2)
    good,stub.GetDatasetStatus = stub.GetDatasetStatus,lambda q: (200, dict(status='FAILED'), {})
    assert 'could not make version 2' in push(stub, '--force', ok=False)
    stub.GetDatasetStatus = good
    push(stub, '--force')
    assert len(stub.datasets['someone/ribo-nb-code']) == 3
    stub.datasets.clear(); extra(stub.extra, 3); stub.polls_until_ready = 4  # created, but not visible yet, and the answer is lost
    stub.fail('CreateDataset', 'cut after')
    push(stub, '--force')
    assert [len(v) for v in stub.datasets.values()] == [1]

def test_a_first_version_that_failed_begins_anew_by_force(stub):
    push(stub)
    stub.status,stub.failure = 'ERROR','no GPU'
    r = kaggle('continue', 'cfg_demo', '--force')
    k = stub.kernels['someone/ribo-nb-cfg-demo'][-1]
    assert 'from the beginning' in r.output and "'step': None" in k['text'] and not k.get('kernelDataSources'), r.output

def test_an_upload_that_fails_makes_no_dataset(stub):
    stub.fail('blob', *[400]*20)
    assert 'run the same command again' in push(stub, ok=False) and not stub.datasets and not stub.kernels
    stub.faults.clear()
    push(stub)
    assert [len(v) for v in stub.datasets.values()] == [1]

def test_continue_until_done_then_pull(stub, mount):
    assert 'ribo_kaggle push cfg_demo' in kaggle('continue', 'cfg_demo').output
    push(stub, '--data', mount/'store.arrow')
    stub.status = 'RUNNING'
    assert 'is running' in kaggle('continue', 'cfg_demo').output and 'running' in kaggle('status', 'cfg_demo').output
    stub.status = 'COMPLETE'
    r = kaggle('continue', 'cfg_demo')  # no output yet
    assert r.exit_code == 1 and 'no ribo.json' in r.output and 'push --force begins anew' in push(stub, ok=False)
    leave(stub, 40)
    assert 'step 40, not done' in kaggle('status', 'cfg_demo').output
    assert 'is not done' in push(stub, ok=False)
    r = kaggle('continue', 'cfg_demo')
    assert r.exit_code == 0 and 'version 2 runs' in r.output and 'from step 40' in r.output, r.output
    a,b = stub.kernels['someone/ribo-nb-cfg-demo']
    assert b['kernelDataSources'] == ['someone/ribo-nb-cfg-demo'] and "'step': 40" in b['text'] and nonce(stub, version=0) != nonce(stub)
    run = lambda k: re.search(r"'run': '(\w+)'", k['text'])[1]
    assert run(a) == run(b) and a['datasetDataSources'] == b['datasetDataSources'] and len(stub.datasets[data_set(stub)]) == 1
    r = kaggle('continue', 'cfg_demo')  # Kaggle shows the first version's output still
    assert r.exit_code == 1 and 'earlier version' in r.output and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 2
    stub.status,stub.failure = 'ERROR','Your notebook tried to allocate more memory than is available.'
    r = kaggle('continue', 'cfg_demo')
    assert r.exit_code == 1 and 'allocate more memory' in r.output and 'the last line' in r.output and '--force' in r.output
    stub.status,stub.failure = 'COMPLETE',''
    leave(stub, 90, True, **{'best.pt': os.urandom(300_000), 'log.jsonl': b'{}', 'sub/x.png': b'p'})
    assert 'is done at step 90' in kaggle('continue', 'cfg_demo', '--wait').output and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 2
    stub.fail('output', 'half', 500, 'cut')
    r = kaggle('pull', 'cfg_demo')
    assert r.exit_code == 0, r.output
    got = stub.project/'datamount'/'runs'/'cfg_demo'
    assert {f'run/{p.relative_to(got)}': p.read_bytes() for p in got.rglob('*') if p.is_file() and p.name != 'ribo.json'} == {k: v for k,v in stub.outputs.items() if k != 'ribo.json'}
    assert not [p for p in got.parent.iterdir() if p != got] and not list(got.rglob('*.part*'))

def test_pull_mixes_nothing(stub):
    "A line that stays cut leaves the old folder; another run's folder and a page of errors are refused, a path outside is not fetched"
    push(stub); leave(stub, 1, **{'best.pt': b'x'*100_000})
    assert kaggle('pull', 'cfg_demo').exit_code == 0
    got = stub.project/'datamount'/'runs'/'cfg_demo'
    leave(stub, 2, **{'best.pt': b'y'*100_000, 'new': b'z'})
    stub.fail('output', None, *['half']*12)  # ribo.json comes, the rest does not
    r = kaggle('pull', 'cfg_demo')
    assert r.exit_code == 1 and 'again' in r.output and (got/'best.pt').read_bytes() == b'x'*100_000 and not (got/'new').exists()
    stub.faults.clear(); stub.fail('output', None, 404)
    assert kaggle('pull', 'cfg_demo').exit_code == 1 and (got/'best.pt').read_bytes() == b'x'*100_000
    assert kaggle('pull', 'cfg_demo').exit_code == 0 and (got/'new').exists() and (got/'best.pt').read_bytes() == b'y'*100_000
    (got/'mine.txt').write_text('a note'); leave(stub, 3, **{'new': b'z'})
    assert kaggle('pull', 'cfg_demo').exit_code == 0 and (got/'mine.txt').read_text() == 'a note'
    (got/'log.jsonl').write_text('{"step": 900}\n')
    assert 'further than' in kaggle('pull', 'cfg_demo').output
    (got/'log.jsonl').unlink()
    leave(stub, 3, **{'../../../outside': b'!'})
    # Only what lies below run/ is asked for.
    assert kaggle('pull', 'cfg_demo').exit_code == 0
    assert not list(stub.project.parent.rglob('outside'))
    (got/'ribo.json').write_text((got/'ribo.json').read_text().replace('"run": "', '"run": "f'))
    leave(stub, 4)
    assert 'holds another run' in kaggle('pull', 'cfg_demo').output

def test_wait_goes_from_session_to_session(stub, monkeypatch):
    push(stub); leave(stub, 10)
    saved,n,later,listed = stub.SaveKernel,[],[],stub.ListKernelSessionOutput
    def outputs(q):  # an old output is shown once more
        out = listed(q)
        if later and not q.get('pageToken'): leave(stub, *later.pop())
        return out
    stub.ListKernelSessionOutput = outputs
    def save(q):
        out = saved(q)
        n.append(1); later.append((10 + 10*len(n), len(n) == 3))
        return out
    stub.SaveKernel = save
    out = K.carry_on(K.client(), 'cfg_demo', wait=True, every=.01)
    assert 'is done at step 40' in out and len(stub.kernels['someone/ribo-nb-cfg-demo']) == 4

def test_submit_checks_first_and_sends_once(stub, tmp_path):
    pd.DataFrame(dict(id_min=[0], id_max=[3], sequence_id=['a'], sequence=['ACGU'], future=[0])).to_csv(tmp_path/'t.csv', index=False)
    sub = pd.DataFrame(dict(id=range(4), reactivity_DMS_MaP=.5, reactivity_2A3_MaP=.25))
    sub[:3].to_csv(tmp_path/'short.csv', index=False); sub.to_csv(tmp_path/'s.csv', index=False)
    r = kaggle('submit', tmp_path/'short.csv', '--test', tmp_path/'t.csv')
    assert r.exit_code == 1 and '3 rows, expected 4' in r.output and not stub.seen
    for fault in (500, 429, 'cut', 'cut after'):
        stub.submissions.clear(); stub.fail('CreateSubmission', fault)
        r = kaggle('submit', tmp_path/'s.csv', '--test', tmp_path/'t.csv')
        assert r.exit_code == 0 and len(stub.submissions) == 1 and stub.blobs['sub'] == (tmp_path/'s.csv').read_bytes(), (fault, r.output)
    assert 'it had arrived as submission 1' in kaggle('submit', tmp_path/'s.csv', '--test', tmp_path/'t.csv').output and len(stub.submissions) == 1
    stub.submissions.clear(); stub.fail('StartSubmissionUpload', 403)
    assert '/rules' in kaggle('submit', tmp_path/'s.csv', '--test', tmp_path/'t.csv').output
    stub.fail('blob', *[400]*5)
    r = kaggle('submit', tmp_path/'s.csv', '--test', tmp_path/'t.csv')
    assert r.exit_code == 1 and 'did not take it' in r.output and not stub.submissions

def test_download(stub, monkeypatch, tmp_path):
    "Goes on after a cut, unpacks, checks sizes, leaves alone what is there, and asks the disk first"
    big = os.urandom(3_000_000)
    stub.files = {'train_data.csv': big, 'test_sequences.csv': b'a,b\n'*1000, 'other.csv': b'no'}
    z = io.BytesIO()
    with zipfile.ZipFile(z, 'w') as f: f.writestr('test_sequences.csv', stub.files['test_sequences.csv'])
    stub.files['test_sequences.csv.zip'],stub.zipped = z.getvalue(),{'test_sequences.csv'}
    out = stub.project/'datamount'/'raw'
    monkeypatch.setattr(K.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10**6))())
    r = kaggle('download')
    assert r.exit_code == 1 and 'GB free' in r.output and 'DownloadDataFile' not in stub.names()
    monkeypatch.undo()
    for k,v in dict(KAGGLE_API_ENVIRONMENT='LOCALHOST', http_proxy=stub.url, HTTP_PROXY=stub.url, no_proxy='', KAGGLE_USERNAME='someone', KAGGLE_KEY=KEY).items(): monkeypatch.setenv(k, v)
    monkeypatch.chdir(stub.project); monkeypatch.setattr(K, 'PAUSE', .02)
    stub.fail('ListDataFiles', 403)
    assert '/rules' in kaggle('download').output
    stub.fail('file', 'half')
    r = kaggle('download')
    assert r.exit_code == 0 and (out/'train_data.csv').read_bytes() == big and (out/'test_sequences.csv').read_bytes() == stub.files['test_sequences.csv'], r.output
    assert any('Range' in s.headers for s in stub.seen) and sorted(p.name for p in out.iterdir()) == ['test_sequences.csv','train_data.csv']
    before = len(stub.seen)
    assert kaggle('download').exit_code == 0 and stub.names()[before:] == ['ListDataFiles']
    assert 'has no file nothing.csv' in kaggle('download', '--file', 'nothing.csv').output

def test_ribo_data_fetches_or_finds(stub, mount, tmp_path):
    raw = pd.read_parquet(mount/'raw.parquet').to_csv(index=False).encode()
    stub.files = {'train_data.csv': raw, 'test_sequences.csv': b'x'}
    r = invoke('ribo_data', '--kaggle', '--out', tmp_path/'s.arrow')
    assert r.exit_code == 0 and (tmp_path/'s.arrow').exists() and (stub.project/'datamount'/'raw'/'train_data.csv').read_bytes() == raw, r.output
    (tmp_path/'k'/'input'/'competitions'/'x').mkdir(parents=True)
    shutil.move(stub.project/'datamount'/'raw'/'train_data.csv', tmp_path/'k'/'input'/'competitions'/'x'/'train_data.csv')
    before = len(stub.seen)
    os.environ['RIBO_KAGGLE_ROOT'] = str(tmp_path/'k')
    try: assert invoke('ribo_data', '--kaggle', '--out', tmp_path/'t.arrow').exit_code == 0
    finally: del os.environ['RIBO_KAGGLE_ROOT']
    assert len(stub.seen) == before and (tmp_path/'t.arrow').exists()

def test_accounts(stub, monkeypatch):
    "No account, a wrong token, a token, a new major version of the client"
    monkeypatch.setenv('KAGGLE_API_TOKEN', TOKEN); monkeypatch.delenv('KAGGLE_USERNAME'); monkeypatch.delenv('KAGGLE_KEY')
    push(stub)
    assert list(stub.kernels) == ['someone/ribo-nb-cfg-demo']
    monkeypatch.setenv('KAGGLE_API_TOKEN', 'wrong')
    assert 'does not know the token' in push(stub, ok=False)
    monkeypatch.delenv('KAGGLE_API_TOKEN')
    assert 'Settings → API' in push(stub, ok=False)
    monkeypatch.setattr(K, 'version', lambda n: '3.0.1')
    assert "kaggle 3.0.1 is installed, ribo_nb talks to version 2" in push(stub, ok=False)

def test_plain_client_pushes_the_same_folder(stub):
    out = push(stub, '--dry-run')
    folder = stub.project/'datamount'/'kaggle'/'cfg_demo'/'kernel'
    assert 'nothing was sent' in out and str(folder) in out and not stub.seen
    r = subprocess.run([str(BIN/'kaggle'), 'kernels', 'push', '-p', str(folder)], capture_output=True, text=True, env=env())
    assert 'version 1 successfully pushed' in r.stdout, r.stdout + r.stderr
    assert K.push_kernel(K.client(), folder, 'nonce of another push') == 2
    a,b = stub.kernels['someone/ribo-nb-cfg-demo']
    assert a == b

@pytest.mark.parametrize('damage', ['{"ribo_kaggle": 1', '[]', '{}', '{"ribo_kaggle": 2}'])
def test_a_damaged_result_is_named(tmp_path, damage):
    (tmp_path/'ribo.json').write_text(damage)
    with pytest.raises(ValueError, match='ribo.json: is no version-1 result'):
        K.read_result(tmp_path/'ribo.json')

@pytest.mark.parametrize('change', [lambda state: '{', lambda state: '[1]',
                                    lambda state: json.dumps({k: v for k, v in state.items() if k != 'order'})])
def test_a_record_that_is_damaged_or_of_an_earlier_version_is_named(stub, change):
    "Records in datamount/kaggle once lacked `order`: the message says what to do, and a push begins anew"
    push(stub)
    record = stub.project/'datamount'/'kaggle'/'cfg_demo.json'
    record.write_text(change(json.loads(record.read_text())))
    for words in (['continue', 'cfg_demo'], ['status', 'cfg_demo'], ['pull', 'cfg_demo']):
        r = kaggle(*words)
        assert r.exit_code == 1 and 'cfg_demo.json: is damaged, or of an earlier version' in r.output, r.output
        assert 'delete it' in r.output and isinstance(r.exception, SystemExit)
    assert 'delete it' in push(stub, ok=False)
    record.unlink()
    push(stub)
    assert len(stub.kernels['someone/ribo-nb-cfg-demo']) == 2

def test_a_dataset_record_of_an_earlier_version_is_used(stub):
    "It had a key more; what did not change is not sent again"
    push(stub)
    record = stub.project/'datamount'/'kaggle'/'someone-ribo-nb-code.json'
    record.write_text(json.dumps(dict(version=1) | json.loads(record.read_text())))
    push(stub, '--force')
    assert [len(v) for v in stub.datasets.values()] == [1]

# the kernel itself

def _needed(names):
    "Distributions that these need, and theirs, all installed here"
    todo,seen = list(names),{}
    while todo:
        n = re.split(r'[\s;<>=!~\[(]', todo.pop())[0].lower().replace('_', '-')
        if n in seen: continue
        try: seen[n] = d = metadata.distribution(n)
        except metadata.PackageNotFoundError: continue
        todo += [r for r in d.requires or [] if 'extra ==' not in r]
    return seen

@pytest.fixture(scope='session')
def image(tmp_path_factory):
    "A Python like Kaggle's image: what ribo_nb needs and a kernel, not ribo_nb, no development package"
    d = tmp_path_factory.mktemp('image')
    venv.create(d, with_pip=True, symlinks=True)
    site = next(d.glob('lib/python*/site-packages'))
    needed = _needed([*re.search(r'^requirements = (.*)$', (ROOT/'settings.ini').read_text(), re.M)[1].split(), 'ipykernel', 'setuptools'])
    assert not {'fastcore','nbdev','papermill','pytest','rdat-kit','kaggle','requests','ribo-nb'} & needed.keys()
    for dist in needed.values():
        for top in {p.parts[0] for p in dist.files or [] if p.parts[0] not in ('..','__pycache__')}:
            if (dist.locate_file(top)).exists() and not (site/top).exists(): (site/top).symlink_to(dist.locate_file(top))
    (site/'sitecustomize.py').write_text("import socket\nold = socket.socket.connect\ndef connect(self, a):\n    if isinstance(a, tuple) and a[0] not in ('127.0.0.1','localhost','::1'): raise OSError('no internet')\n    return old(self, a)\nsocket.socket.connect = connect\n")
    return d

def execute(image, kernel, root, tmp):
    "As Kaggle does → the notebook; AssertionError with the kernel's words when it failed"
    import jupyter_client,papermill
    name,share = 'kaggle-image',tmp/'share'
    spec = share/'jupyter'/'kernels'/name
    spec.mkdir(parents=True, exist_ok=True)
    (spec/'kernel.json').write_text(json.dumps(dict(argv=[str(image/'bin'/'python'), '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name=name, language='python',
        env=dict(RIBO_KAGGLE_ROOT=str(root), PYTHONPATH='', OMP_NUM_THREADS='1', TQDM_DISABLE='1'))))
    (root/'working').mkdir(parents=True, exist_ok=True)
    r = subprocess.run([str(BIN/'papermill'), '--no-progress-bar', '-k', name, str(kernel), str(tmp/'out.ipynb')], cwd=root/'working', capture_output=True, text=True,
                       env=env(JUPYTER_PATH=str(share/'jupyter'), PYTHONPATH='', http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9'))
    return r,(tmp/'out.ipynb').read_text() if (tmp/'out.ipynb').exists() else ''

def attach(project, root, output=None, names='*'):
    "/kaggle/input as the kernel of the last dry run finds it"
    kernel = project/'datamount'/'kaggle'
    for d in kernel.glob(f'{names}/dataset-*'):
        to = root/'input'/d.name
        to.mkdir(parents=True)
        for f in d.iterdir():
            if f.name != 'dataset-metadata.json': shutil.copy(f, to)
    if output: shutil.copytree(output, root/'input'/'notebooks'/'someone'/'ribo-nb-cfg-demo')

def test_kernel_stopped_by_its_budget_and_continued_equals_one_long_run(stub, mount, image, tmp_path, monkeypatch):
    o = json.dumps(json.loads(TINY) | dict(n_epoch=60, dropout=.1, flip=True, ema=.99))
    args = ('--data', mount/'store.arrow', '--bpp', mount/'bpp', '--overrides', o, '--accelerator', 'none')
    push(stub, *args, '--hours', 1)
    kernel,state = stub.project/'datamount'/'kaggle'/'cfg_demo'/'kernel',stub.project/'datamount'/'kaggle'/'cfg_demo.json'
    attach(stub.project, tmp_path/'whole')
    r,nb = execute(image, kernel/'kernel.ipynb', tmp_path/'whole', tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    whole = K.read_result(tmp_path/'whole'/'working'/'ribo.json')
    assert whole['finished'] and 'ribo_kaggle pull cfg_demo' in nb
    push(stub, *args, '--hours', .01, '--force')
    steps,output = [None],None
    text = (kernel/'kernel.ipynb').read_text()
    while len(steps) < 9:
        root = tmp_path/f'part{len(steps)}'
        attach(stub.project, root, output)
        hours = .003*1.6**(len(steps)-1)  # a slow machine may spend a short session on imports alone
        (tmp_path/'part.ipynb').write_text(text.replace("'hours': 0.01", f"'hours': {hours}").replace("'step': None", f"'step': {steps[-1]}"))
        r,nb = execute(image, tmp_path/'part.ipynb', root, tmp_path)
        assert r.returncode == 0, r.stderr[-3000:]
        output = root/'working'
        if (result := K.read_result(output/'ribo.json'))['finished']: break
        assert 'ribo_kaggle continue cfg_demo' in nb
        steps.append(result['step'])
    assert result['finished'] and any(0 < s < result['step'] for s in steps[1:]), steps
    a,b = (torch.load(d/'working'/'run'/'best.pt', weights_only=True)['model'] for d in (tmp_path/'whole', root))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    drop = lambda d: [{k: v for k,v in json.loads(l).items() if k not in ('seconds','steps_per_second','peak_MB')} for l in (d/'working'/'run'/'log.jsonl').read_text().splitlines()]
    assert drop(tmp_path/'whole') == drop(root)

def test_kernel_refuses_yesterdays_wheel_and_a_foreign_output(stub, mount, image, tmp_path):
    push(stub, '--data', mount/'store.arrow', '--overrides', TINY, '--accelerator', 'none')
    kernel = stub.project/'datamount'/'kaggle'/'cfg_demo'/'kernel'/'kernel.ipynb'
    attach(stub.project, tmp_path/'a')
    whl = next((tmp_path/'a').rglob('ribo_nb-*.whl'))
    whl.write_bytes(whl.read_bytes() + b' ')
    r,_ = execute(image, kernel, tmp_path/'a', tmp_path)
    assert r.returncode and 'is not the one that was pushed' in r.stderr
    text = kernel.read_text()
    attach(stub.project, tmp_path/'b')
    (tmp_path/'k.ipynb').write_text(text.replace("'step': None", "'step': 5"))
    r,_ = execute(image, tmp_path/'k.ipynb', tmp_path/'b', tmp_path)
    assert r.returncode and 'is not attached' in r.stderr
    (tmp_path/'g.ipynb').write_text(text.replace('cards = probe(False)', 'cards = probe(True)'))
    if not torch.cuda.is_available():
        r,_ = execute(image, tmp_path/'g.ipynb', tmp_path/'b', tmp_path)
        assert r.returncode and 'NvidiaTeslaT4' in r.stderr

def test_kernel_that_predicts(stub, mount, image, tmp_path):
    "push --infer: the outputs of pushed runs, as an ensemble → submission.parquet, which passes the validator"
    from ribo_nb.score import check_submission
    push(stub, '--data', mount/'store.arrow', '--overrides', TINY, '--accelerator', 'none')
    state = json.loads((stub.project/'datamount'/'kaggle'/'cfg_demo.json').read_text())
    run = tmp_path/'k'/'input'/'ribo-nb-cfg-demo'
    r = invoke('ribo_train', 'cfg_demo', '--data', mount/'store.arrow', '--bpp', mount/'bpp', '--run', run/'run', '--overrides', TINY)
    assert r.exit_code == 0, r.output
    (run/'ribo.json').write_text(json.dumps(dict(ribo_kaggle=1, nonce='n', run=state['spec']['run'], step=1, finished=True)))
    r = kaggle('push', '--infer', 'cfg_demo', '--wheel', stub.extra, '--accelerator', 'none')
    assert r.exit_code == 0, r.output
    k, = stub.kernels['someone/ribo-nb-infer']
    assert k['kernelDataSources'] == ['someone/ribo-nb-cfg-demo'] and k['competitionDataSources'] == [K.COMPETITION]
    attach(stub.project, tmp_path/'k', names='infer')
    assert "'hours': 11.5" in k['text']
    shutil.copy(mount/'test'/'test_sequences.csv', tmp_path/'k'/'input')
    r,nb = execute(image, stub.project/'datamount'/'kaggle'/'infer'/'kernel'/'kernel.ipynb', tmp_path/'k', tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    out = tmp_path/'k'/'working'/'submission.parquet'
    assert check_submission(out, mount/'test'/'test_sequences.csv') and 'ribo_kaggle pull infer' in nb
    stub.outputs = {'ribo.json': (tmp_path/'k'/'working'/'ribo.json').read_bytes(), 'submission.parquet': out.read_bytes()}
    r = kaggle('pull', 'infer')
    assert r.exit_code == 0 and (stub.project/'datamount'/'submission'/'submission.parquet').read_bytes() == out.read_bytes(), r.output
