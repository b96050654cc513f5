"Processes that are killed, stopped and started again."
import json,pickle,random,signal,time
import pytest,torch
from helpers import TINY,call,invoke,start

def run(mount, out, *more, cfg='cfg_demo', overrides=TINY):
    return ('ribo_train', cfg, '--data', mount/'store.parquet', '--bpp', mount/'bpp', '--run', out, '--overrides', overrides, *more)

def weights(out): return torch.load(out/'best.pt', weights_only=True)['model']

def log(out): return [{k: v for k,v in json.loads(l).items() if k != 'seconds'} for l in (out/'log.jsonl').read_text().splitlines()]

@pytest.mark.parametrize('model', ['squeezeformer','mamba'])
def test_killed_run_equals_uninterrupted(mount, tmp_path, model):
    "SIGKILL at random moments, SIGTERM once; started again each time; same weights and log, bit for bit"
    o = json.dumps(json.loads(TINY) | dict(model=model, n_epoch=12, dropout=.1, save_minutes=.002))
    assert call(*run(mount, tmp_path/'whole', overrides=o)).returncode == 0
    rng,hit = random.Random(model),0
    for sig in (signal.SIGKILL, signal.SIGTERM):
        p = start(*run(mount, tmp_path/'parts', overrides=o))
        before = _step(tmp_path/'parts')
        while p.poll() is None and _step(tmp_path/'parts') <= before: time.sleep(.02)
        time.sleep(rng.random()*.3)
        if p.poll() is None: hit += 1
        p.send_signal(sig)
        err = p.communicate(timeout=60)[1]
        if sig == signal.SIGTERM and p.returncode: assert p.returncode == 130 and 'start the same run again' in err
    assert hit, 'no kill fell into a running run: the run is too short for this test'
    assert call(*run(mount, tmp_path/'parts', overrides=o)).returncode == 0
    a,b = weights(tmp_path/'whole'),weights(tmp_path/'parts')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(tmp_path/'whole') == log(tmp_path/'parts')
    metrics = [json.loads((tmp_path/d/'metrics.json').read_text())['scores'] for d in ('whole','parts')]
    assert metrics[0] == metrics[1]

def _step(out):
    "Time of the newest checkpoint"
    return (out/'last.pt').stat().st_mtime_ns if (out/'last.pt').exists() else 0

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
