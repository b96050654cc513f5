"The trained models that the package carries."
import json,subprocess,zipfile
import numpy as np,pandas as pd,pytest
from helpers import BIN,ROOT,call,env
from ribo_nb import ensemble
from ribo_nb.bpp import ETERNAFOLD,native_params
from ribo_nb.data import sha256
from ribo_nb.ensemble import SHIPPED
from ribo_nb.infer import load, predict
from ribo_nb.kaggle import build_wheel

MODELS = ['squeezeformer.pt','mamba.pt','squeezeformer-large.pt']
FILES = {*MODELS,'ensemble.json','MODEL_CARD.md','EternaFoldParams.v1','EternaFold.LICENSE'}

def bare():
    "An environment in which nobody has EternaFold"
    return {k: v for k,v in env().items() if k not in ('ETERNAFOLD_PARAMETERS','CONDA_PREFIX')}

@pytest.fixture
def rnas():
    rng = np.random.default_rng(3)
    return [''.join(rng.choice(list('ACGU'), n)) for n in (115, 40, 77)]

def test_complete_small_and_as_written():
    "All files, no others, at most 20 MB, each model with the hash that ensemble.json gives"
    assert {p.name for p in SHIPPED.parent.iterdir()} == FILES
    assert sum(p.stat().st_size for p in SHIPPED.parent.iterdir()) <= 20e6
    d = json.loads(SHIPPED.read_text())
    assert {m['path']: m['sha256'] for m in d['members']} == {p: sha256(SHIPPED.parent/p) for p in MODELS}
    assert len(d['data']) > 10
    model = load(device='cpu')
    assert model.flip == d.get('flip', False) and [c.model for c in model.cfgs] == ['squeezeformer','mamba','squeezeformer']
    assert {(c.engine, c.engine_params) for c in model.cfgs} == {('native', sha256(ETERNAFOLD)[:8])}

def test_eternafold_only_when_it_is_wanted(monkeypatch, tmp_path):
    for name in ('ETERNAFOLD_PARAMETERS','CONDA_PREFIX'): monkeypatch.delenv(name, raising=False)
    assert native_params('1421e89c') == ETERNAFOLD and 'contrafold' in native_params().name
    monkeypatch.setenv('ETERNAFOLD_PARAMETERS', str(tmp_path/'gone'))
    assert native_params('1421e89c') == ETERNAFOLD and native_params() == tmp_path/'gone'

def test_command_without_checkpoint(rnas, tmp_path):
    (tmp_path/'x.fa').write_text(''.join(f'>r{k}\n{s}\n' for k,s in enumerate(rnas)))
    r = subprocess.run([str(BIN/'ribo_infer'), 'x.fa', '--out', 'x.parquet', '--device', 'cpu'], cwd=tmp_path, env=bare(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    said = [line for line in r.stderr.splitlines() if 'squeezeformer.pt, mamba.pt and squeezeformer-large.pt' in line]
    assert len(said) == 1 and 'Ribonanza' in said[0] and str(SHIPPED.parent/'MODEL_CARD.md') in said[0]
    t = pd.read_parquet(tmp_path/'x.parquet')
    for c in ('reactivity_2A3_MaP','reactivity_DMS_MaP'):
        x = np.concatenate(t[c])
        assert len(x) == sum(map(len, rnas)) and np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    assert 'models that come with' in ' '.join(call('ribo_infer', '--help').stdout.split())

def test_alone_or_in_company(rnas):
    model = load(device='cpu')
    together = predict(model, rnas)
    for k,s in enumerate(rnas):
        for c in ('reactivity_2A3_MaP','reactivity_DMS_MaP'): assert np.abs(predict(model, s)[c][0] - together[c][k]).max() <= 1e-5

def test_missing_or_damaged_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(ensemble, 'SHIPPED', tmp_path/'ensemble.json')
    with pytest.raises(ValueError, match='ensemble.json: no such file: install ribo_nb again'): load()
    (tmp_path/'ensemble.json').write_bytes(SHIPPED.read_bytes())
    with pytest.raises(ValueError, match='squeezeformer.pt: is missing or .*: install ribo_nb again'): load()
    (tmp_path/'ensemble.json').write_text('{}')
    with pytest.raises(ValueError, match='is not an ensemble .*: install ribo_nb again'): load()

def test_card():
    card = (SHIPPED.parent/'MODEL_CARD.md').read_text()
    assert all(w in card for w in ('## Training data','7a1c060ce94f','MIT','## Licences','Apache-2.0','BSD-3','## Evaluation','Mean absolute error','## Not good for'))
    assert 'TODO' not in card
    assert 'Redistribution' in (SHIPPED.parent/'EternaFold.LICENSE').read_text()

def test_wheel_carries_them(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path, ROOT)) as z:
        assert {n.split('/')[-1] for n in z.namelist() if n.startswith('ribo_nb/weights/')} == FILES
        for f in FILES: assert z.read(f'ribo_nb/weights/{f}') == (SHIPPED.parent/f).read_bytes()
