"Processes that are killed, stopped and started again."
import contextlib,importlib.util,io,itertools,json,multiprocessing,os,pickle,random,signal,subprocess,sys,threading,time
import numpy as np,pandas as pd,psutil,pytest,torch
from types import SimpleNamespace
from helpers import BIN,ROOT,TINY,call,env,invoke,start
from ribo_nb import tasks, train
from ribo_nb.config import load_checkpoint, make_cfg
from ribo_nb.trackers import read_neptune, tracking
from ribo_nb.train import COSTS, STOPPED, is_training, train_run

def run(mount, out, *more, cfg='cfg_demo', overrides=TINY):
    return ('ribo_train', cfg, '--data', mount/'store.arrow', '--bpp', mount/'bpp', '--run', out, '--overrides', overrides, *more)

def weights(out): return torch.load(out/'best.pt', weights_only=True)['model']

def log(out): return [{k: v for k,v in json.loads(l).items() if k not in COSTS} for l in (out/'log.jsonl').read_text().splitlines()]

def child(cfg, store, out, bpps, steps=None):
    "A training process, as ribo_train is one; after so many `steps` it slows down, so that it is killed before it ends"
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from ribo_nb.train import STOPPED,Stopped,train_run
    count = itertools.count(1)
    if steps: register_optimizer_step_post_hook(lambda *_: next(count) > steps and time.sleep(.5))
    torch.set_num_threads(1)
    os.environ['TQDM_DISABLE'] = '1'
    try: train_run(cfg, store, out, bpps)
    except Stopped: sys.exit(STOPPED)

@pytest.fixture(scope='module')
def fork():
    "Starts children of a process that has everything imported, which saves five seconds each"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['ribo_nb.train','test_train'])
    def begin(*args):
        p = ctx.Process(target=child, args=args)
        p.start()
        return p
    return begin

@pytest.mark.parametrize('model', ['squeezeformer','mamba'])
def test_killed_thirty_times_equals_uninterrupted(mount, tmp_path, fork, model):
    "SIGKILL 20 times at random moments, SIGTERM and SIGINT 5 times each; same weights, log and metrics, bit for bit"
    cfg = make_cfg('cfg_demo', json.loads(TINY) | dict(model=model, n_epoch=60, dropout=.1, flip=True, ema=.99, accumulate=2, save_minutes=.0005))
    args = mount/'store.arrow',tmp_path/'parts',mount/'bpp'
    (whole := fork(cfg, args[0], tmp_path/'whole', args[2])).join()
    assert whole.exitcode == 0
    rng,codes = random.Random(model),[]
    for sig in rng.sample([signal.SIGKILL]*20 + [signal.SIGTERM]*5 + [signal.SIGINT]*5, 30):
        before,p = _step(tmp_path/'parts'),fork(cfg, *args, 8)
        while p.is_alive() and _step(tmp_path/'parts') <= before: time.sleep(.005)
        time.sleep(rng.random()*.1)
        os.kill(p.pid, sig); p.join(60)
        codes.append((sig, p.exitcode))
    assert all(c in ((-9,) if s == signal.SIGKILL else (STOPPED,)) for s,c in codes), codes  # none had come to its end
    (last := fork(cfg, *args)).join()
    assert last.exitcode == 0
    a,b = weights(tmp_path/'whole'),weights(tmp_path/'parts')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(tmp_path/'whole') == log(tmp_path/'parts')
    metrics = [json.loads((tmp_path/d/'metrics.json').read_text())['scores'] for d in ('whole','parts')]
    assert metrics[0] == metrics[1]

def _step(out):
    "Time of the newest checkpoint"
    try: return (out/'last.pt').stat().st_mtime_ns
    except FileNotFoundError: return 0  # none yet, or between prev.pt and last.pt

def until(p, out, before=0):
    while p.poll() is None and _step(out) <= before: time.sleep(.02)

KILLS = int(os.environ.get('RIBO_KILLS', 2))

def test_papermill_killed_and_ignoring_sigint(mount, tmp_path):
    "Killed with its kernel, or interrupted where a shell's background job is deaf to SIGINT, at `KILLS` moments; it goes on"
    o = json.dumps(json.loads(TINY) | dict(n_epoch=10 + 4*KILLS, save_minutes=.001))
    args = lambda out: ('papermill', '--no-progress-bar', ROOT/'nbs'/'04_train.ipynb', out/'train.ipynb', '-p', 'cfg', 'cfg_demo', '-p', 'data', mount/'store.arrow', '-p', 'bpps', mount/'bpp', '-p', 'run', out, '-p', 'overrides', o)
    for d in ('whole','parts'): (tmp_path/d).mkdir()
    assert call(*args(tmp_path/'whole')).returncode == 0
    parts = tmp_path/'parts'
    for k in range(KILLS):
        sig = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[k % 3]
        before,p = _step(parts),subprocess.Popen(['sh', '-c', "trap '' INT; exec \"$@\"", 'sh', BIN/'papermill', *map(str, args(parts)[1:])], cwd=ROOT, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        until(p, parts, before); time.sleep(random.random()*.1)
        assert p.poll() is None, 'the run has ended before it could be killed'
        pid = json.loads((parts/'status.json').read_text())['pid']
        if sig == signal.SIGKILL: os.killpg(p.pid, sig)
        with contextlib.suppress(ProcessLookupError): os.kill(pid, sig)  # the kernel has a session of its own
        assert p.wait(60) != 0 and (sig == signal.SIGKILL or 'start the same run again' in (parts/'train.ipynb').read_text())
        while is_training(parts): time.sleep(.05)
    assert call(*args(parts)).returncode == 0
    a,b = weights(tmp_path/'whole'),weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a) and log(tmp_path/'whole') == log(parts)

def test_command_stops_with_its_own_exit_code(mount, tmp_path):
    o = json.dumps(json.loads(TINY) | dict(n_epoch=500, save_minutes=.001))
    p = start(*run(mount, tmp_path, overrides=o)); until(p, tmp_path)
    r = invoke(*run(mount, tmp_path, overrides=o))  # a second start of the same folder
    assert r.exit_code == 1 and 'trains here already' in r.output
    assert 'sequences/s' in invoke('ribo_train', '--watch', tmp_path).output or 'no loss logged yet' in invoke('ribo_train', '--watch', tmp_path).output
    assert 'saves after its step and stops' in invoke('ribo_train', '--stop', tmp_path).output
    err = p.communicate(timeout=60)[1]
    assert p.returncode == STOPPED and 'start the same run again' in err and not is_training(tmp_path)

@pytest.mark.parametrize('damage', ['cut','bit','empty','pickle'])
def test_damaged_checkpoint_falls_back_to_the_one_before(mount, tmp_path, damage):
    o = TINY[:-1] + ', "save_minutes": 0.0}'
    assert invoke(*run(mount, tmp_path/'a', overrides=o)).exit_code == 0
    want,last = weights(tmp_path/'a'),tmp_path/'a'/'last.pt'
    data = last.read_bytes()
    last.write_bytes(dict(cut=data[:-99], bit=data[:999] + bytes([data[999]^1]) + data[1000:], empty=b'', pickle=pickle.dumps(Bomb(tmp_path/'exploded')))[damage])
    r = invoke(*run(mount, tmp_path/'a', overrides=o))
    assert r.exit_code == 0 and 'going on from prev.pt' in r.output and not (tmp_path/'exploded').exists()
    assert all(torch.equal(v, want[k]) for k,v in weights(tmp_path/'a').items())

def test_all_folds_and_their_comparison(mount, tmp_path):
    r = invoke(*run(mount, tmp_path, '--all-folds', overrides=TINY))
    assert r.exit_code == 0 and len(list(tmp_path.glob('fold*/metrics.json'))) == 4
    r = invoke('ribo_score', *(a for f in range(2) for a in ('--runs', tmp_path/f'fold{f}')))
    assert r.exit_code == 0 and 'fold0' in r.output and ' to 0.' in r.output
    r = invoke('ribo_train', '--stop', tmp_path/'fold0')
    assert r.exit_code == 0 and 'nothing trains here' in r.output

def test_full_disk_keeps_the_last_checkpoint(mount, tmp_path):
    "No file may grow beyond what the log and the small files need"
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); from ribo_nb.commands import ribo_train; ribo_train()"
    o = TINY[:-1] + ', "save_minutes": 0.0}'
    assert invoke(*run(mount, tmp_path, overrides=o)).exit_code == 0
    before = (tmp_path/'last.pt').read_bytes()
    (tmp_path/'last.pt').unlink()  # go on from the one before
    r = subprocess.run([sys.executable, '-c', code, *map(str, run(mount, tmp_path, overrides=o)[1:])], env=env(), capture_output=True, text=True)
    assert r.returncode == 1 and 'make room and start again' in r.stderr, r.stderr[-500:]
    assert invoke(*run(mount, tmp_path, overrides=o)).exit_code == 0 and load_checkpoint(tmp_path/'last.pt')['position'] == torch.load(io.BytesIO(before), weights_only=True)['position']

@pytest.mark.parametrize('tracker', ['none','tensorboard','neptune'])
def test_every_tracker_without_network_or_token(mount, tmp_path, tracker, monkeypatch):
    "Whether the package is there or not, training comes to its end"
    monkeypatch.delenv('NEPTUNE_API_TOKEN', raising=False)
    r = invoke(*run(mount, tmp_path, overrides=TINY[:-1] + f', "n_epoch": 8, "tracker": "{tracker}"}}'))
    assert r.exit_code == 0
    if tracker == 'tensorboard' and importlib.util.find_spec('tensorboard'): assert list((tmp_path/'tensorboard').glob('events*'))
    if tracker == 'neptune' and importlib.util.find_spec('neptune'): assert 'loss' in set(read_neptune(tmp_path).name)

def test_a_tracker_that_hangs_or_fails_stops_nothing(mount, tmp_path, capsys):
    cfg = make_cfg('cfg_demo', dict(tracker='neptune'))
    taken, released = [], threading.Event()
    def hangs(out, cfg):
        def sink(*line):
            taken.append(line)
            released.wait(60)
        return sink, lambda: None
    def fails(out, cfg): raise OSError('no network')
    for sink in (hangs, fails):
        with tracking(cfg, tmp_path, dict(neptune=sink)) as put:
            for k in range(20_000): put(dict(step=k))
            if sink is hangs:
                assert len(taken) <= 1  # all were put while the first one hung: nobody has waited
                released.set()
                while len(taken) < 10_000: time.sleep(.01)  # the queue is empty, so that the end fits into it
    assert 'training goes on without it' in capsys.readouterr().err

def two(mount, out, o): # the command that trains on two processes
    port = f'--master-port={random.randint(20_000, 60_000)}'
    return ('torchrun', '--nproc-per-node=2', port, '--no-python', BIN/'ribo_train', *('--out' if a == '--run' else a for a in run(mount, out, overrides=o)[1:]))

def same_curve(a, b, eps=1e-4):
    "Same steps, and the same loss to rounding"
    a,b = log(a),log(b)
    assert [l['step'] for l in a] == [l['step'] for l in b]
    assert all(abs(x.get('loss', x.get('mae')) - y.get('loss', y.get('mae'))) < eps for x,y in zip(a, b, strict=True))

TWO = json.dumps(json.loads(TINY) | dict(n_epoch=6, dropout=0., flip=True, ema=.9))

@pytest.fixture(scope='module')
def alone(mount, tmp_path_factory):
    "The same run in one process"
    out = tmp_path_factory.mktemp('alone')
    assert invoke(*run(mount, out, overrides=TWO)).exit_code == 0
    return out

def test_two_processes_train_as_one(mount, tmp_path, alone):
    "Same global batch, same loss to rounding; what one process has begun, two can end"
    o = TWO
    r = call(*two(mount, tmp_path/'two', o))
    assert r.returncode == 0, r.stderr[-2000:]
    same_curve(alone, tmp_path/'two')
    with pytest.raises(ZeroDivisionError):  # one process dies after an epoch, two go on
        train_run(make_cfg('cfg_demo', o), mount/'store.arrow', tmp_path/'other', mount/'bpp', lambda lines: 1/(lines[-1]['epoch'] - 3))
    assert call(*two(mount, tmp_path/'other', o)).returncode == 0
    same_curve(alone, tmp_path/'other')
    a,b = weights(alone),weights(tmp_path/'other')
    assert all((a[k] - b[k]).abs().max() < 1e-3 for k in a)

def test_a_dead_rank_ends_the_job_which_goes_on(mount, tmp_path):
    o = json.dumps(json.loads(TWO) | dict(n_epoch=200, save_minutes=.0005))
    p = start(*two(mount, tmp_path, o)); until(p, tmp_path)
    ranks(p)[0].kill()
    assert p.wait(120) != 0
    step = load_checkpoint(tmp_path/'last.pt')['position']['step']
    p = start(*two(mount, tmp_path, o)); until(p, tmp_path, _step(tmp_path))
    os.killpg(p.pid, signal.SIGTERM); p.communicate(timeout=120)
    assert load_checkpoint(tmp_path/'last.pt')['position']['step'] > step

def ranks(p): # the training processes below a torchrun
    return [q for q in psutil.Process(p.pid).children(recursive=True) if 'ribo_train' in ' '.join(q.cmdline()) and 'torchrun' not in ' '.join(q.cmdline())]

def test_two_nodes_on_loopback_by_the_documented_script(mount, tmp_path):
    "docs/slurm.sh with a stand-in for SLURM that starts both nodes here; a rank dies, all begin again, the job ends well"
    for name,text in (('scontrol', 'echo 127.0.0.1'), ('srun', '"$@" & "$@" & wait $! && wait')):
        (tmp_path/name).write_text(f'#!/bin/sh\n{text}\n'); (tmp_path/name).chmod(0o755)
    o = json.dumps(json.loads(TWO) | dict(save_minutes=.0005))
    e = env(SLURM_NNODES='2', SLURM_JOB_ID='7', SLURM_JOB_NODELIST='x', PER_NODE='1', PORT=str(random.randint(20_000, 60_000)))
    e['PATH'] = f"{tmp_path}{os.pathsep}{e['PATH']}"
    args = ['--out' if a == '--run' else str(a) for a in run(mount, tmp_path/'run', overrides=o)[1:]]
    p = subprocess.Popen(['bash', ROOT/'docs'/'slurm.sh', *args], cwd=ROOT, env=e, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(p, tmp_path/'run')
    ranks(p)[-1].kill()
    err = p.communicate(timeout=300)[1]
    assert p.returncode == 0 and (tmp_path/'run'/'metrics.json').exists(), err[-2000:]
    starts = [json.loads(l) for l in (tmp_path/'run'/'starts.jsonl').read_text().splitlines()]
    assert len(starts) > 1 and {s['processes'] for s in starts} == {2}

def test_notebook_starts_torchrun_that_outlives_it(mount, tmp_path, monkeypatch):
    "The one who called `launch` is killed; the run goes on; a second call looks on and gets the metrics"
    code = "import json,sys; from ribo_nb.train import launch, make_cfg; a = json.loads(sys.argv[1]); launch(make_cfg('cfg_demo', a['o']), 2, a['data'], a['out'], a['bpps'])"
    o = json.dumps(json.loads(TWO) | dict(n_epoch=10, save_minutes=.0))
    argv = [sys.executable, '-c', code, json.dumps(dict(o=o, data=str(mount/'store.arrow'), out=str(tmp_path), bpps=str(mount/'bpp')))]
    p = subprocess.Popen(argv, env=env(), cwd=ROOT); until(p, tmp_path)
    rank = psutil.Process(json.loads((tmp_path/'status.json').read_text())['pid'])
    rank.suspend()  # it must not end before the second call has looked at it
    p.kill(); p.wait()
    assert is_training(tmp_path)
    looks = []
    def look(seconds):
        looks.append(rank.is_running())
        with contextlib.suppress(psutil.NoSuchProcess): rank.resume()
        time.sleep(.1)
    monkeypatch.setattr(train, 'time', SimpleNamespace(sleep=look))
    metrics = train.launch(make_cfg('cfg_demo', o), 2, mount/'store.arrow', tmp_path, mount/'bpp')
    assert metrics['parameters'] > 1000 and metrics['finished'] and looks[0]
    assert len((tmp_path/'starts.jsonl').read_text().splitlines()) == 1

def test_same_seed_same_metrics_other_seed_not(mount, tmp_path):
    for d,o in (('a', TINY), ('b', TINY), ('c', TINY[:-1] + ', "seed": 1}')): assert invoke(*run(mount, tmp_path/d, overrides=o)).exit_code == 0
    a,b,c = ((tmp_path/d/'metrics.json').read_text() for d in 'abc')
    assert a == b != c

def test_finished_run_is_not_trained_again_and_belongs_to_its_cfg(mount, tmp_path):
    assert invoke(*run(mount, tmp_path)).exit_code == 0
    before = {f: (tmp_path/f).read_bytes() for f in ('log.jsonl','metrics.json')}
    r = invoke(*run(mount, tmp_path, overrides=TINY[:-1] + ', "lr": 0.5}'))
    assert r.exit_code == 1 and 'lr: 0.003 there, 0.5 here' in r.output
    assert invoke(*run(mount, tmp_path)).exit_code == 0
    assert all((tmp_path/f).read_bytes() == b for f,b in before.items())

def test_wrong_names_are_errors_that_list_the_right_ones(mount, tmp_path):
    for args,text in ((dict(cfg='cfg_9'), 'there are: cfg_0, cfg_mamba, cfg_ribonanzanet, cfg_seed32, cfg_demo'), (dict(overrides='{"lrr": 1}'), 'its fields are: model')):
        r = invoke(*run(mount, tmp_path/'x', **args))
        assert r.exit_code == 1 and text in r.output and not (tmp_path/'x').exists()

def test_checkpoint_with_code_in_it_is_refused(mount, tmp_path):
    "By name, and its code is not executed"
    (tmp_path/'last.pt').write_bytes(pickle.dumps(Bomb(tmp_path/'exploded')))
    r = invoke(*run(mount, tmp_path))
    assert r.exit_code == 1 and 'last.pt: damaged' in r.output and not (tmp_path/'exploded').exists()

class Bomb:
    "Unpickled, it creates a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open,(self.path, 'w')

def test_one_measurement_of_each_sequence_another_in_the_next_epoch(mount):
    import numpy as np
    from ribo_nb.data import Store
    from ribo_nb.tasks import training_rows
    store,cfg = Store(mount/'store.arrow'),make_cfg('cfg_demo', dict(one_each=True, fold=0))
    a,b = (training_rows(store, cfg, e) for e in (0, 1))
    seqs = [store.rows.sequence.iloc[r].tolist() for r in (a, b)]
    assert seqs[0] == seqs[1] and len(set(seqs[0])) == len(seqs[0])  # each once, batches stay as they are
    assert set(seqs[0]) == set(store.rows.sequence[store.rows.fold != 0]) and (a != b).any()
    assert np.array_equal(a, training_rows(store, cfg, 0))

def test_start_from_weights_and_scores_only_where_due(mount, tmp_path):
    tiny = json.loads(TINY)
    train_run(make_cfg('cfg_demo', tiny | dict(n_epoch=1)), mount/'store.arrow', tmp_path/'a', mount/'bpp', brief=True)
    go_on = tiny | dict(n_epoch=3, start=str(tmp_path/'a'/'best.pt'), lr=1e-9, score_every=2)
    m = train_run(make_cfg('cfg_demo', go_on), mount/'store.arrow', tmp_path/'b', mount/'bpp', brief=True)
    a,b = weights(tmp_path/'a'),weights(tmp_path/'b')
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)  # such a small rate changes nothing
    assert [l['epoch'] for l in log(tmp_path/'b') if 'mae' in l] == [2, 3]  # every second epoch, and the last
    assert list(m['scores']) == ['squeezeformer'] and not list((tmp_path/'b').glob('*.png'))  # brief
    with pytest.raises(ValueError, match='does not fit'):
        train_run(make_cfg('cfg_demo', go_on | dict(d_model=32)), mount/'store.arrow', tmp_path/'c', mount/'bpp')

def test_replicates_are_predicted_once(monkeypatch):
    "Several measurements of a sequence cost one prediction, and each row gets it"
    seen = []
    monkeypatch.setattr(tasks, 'predict_sequences', lambda model, seqs, bpp, many: seen.append(seqs) or [np.full((len(s), 2), k) for k,s in enumerate(seqs)])
    store = SimpleNamespace(rows=pd.DataFrame(dict(sequence=['AAA','CCCC','AAA','GG'])))
    preds = tasks.predict_rows(torch.nn.Linear(1, 1), store, None, np.array([2, 1, 0]))
    assert seen == [['AAA','CCCC']] and [p[0,0] for p in preds] == [0, 1, 0]
