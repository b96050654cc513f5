"The parameterised notebooks, as papermill runs them."
import json
from helpers import ROOT,TINY,call,invoke

def papermill(mount, out, *params):
    return call('papermill', '--no-progress-bar', ROOT/'nbs'/'04_train.ipynb', out/'train.ipynb', '-p', 'data', mount/'store.arrow', '-p', 'bpps', mount/'bpp', *params)

def text(notebook): return json.dumps(json.loads(notebook.read_text())['cells'])

def test_two_configurations_train_two_models(mount, tmp_path):
    "What the executed notebooks record differs where the configurations do"
    for cfg,model,size in (('cfg_demo','squeezeformer','4,'), ('cfg_mamba','mamba','2,')):
        out = tmp_path/cfg
        out.mkdir()
        r = papermill(mount, out, '-p', 'cfg', cfg, '-p', 'run', out, '-p', 'overrides', TINY)
        assert r.returncode == 0, r.stderr[-2000:]
        metrics,ck = json.loads((out/'metrics.json').read_text()),json.loads((out/'cfg.json').read_text())['cfg']
        assert metrics['model'] == ck['model'] == model and ck['d_model'] == 16
        assert f"{metrics['parameters']}" in text(out/'train.ipynb') and f'>{model}<' in text(out/'train.ipynb')
        assert all((out/f).exists() for f in ('loss.png','scores.png','predicted.png','profile.png','best.pt','last.pt','log.jsonl'))
    assert json.loads((tmp_path/'cfg_demo'/'metrics.json').read_text())['parameters'] != metrics['parameters']

def test_misspelt_names_stop_the_run(mount, tmp_path):
    "An unknown cfg, override or parameter name: an error, in the executed notebook too, that lists the valid names"
    for params,says in ((('-p','cfg','cfg_1'), 'there are: cfg_0, cfg_mamba, cfg_ribonanzanet, cfg_seed32, cfg_demo'), (('-p','overrides','{"lrate": 1}'), 'its fields are: model'), (('-p','cgf','cfg_0'), 'its parameters are cfg, overrides, data, run, bpps')):
        r = papermill(mount, tmp_path, '-p', 'run', tmp_path/'run', *params)
        assert r.returncode != 0 and says in r.stderr and says in text(tmp_path/'train.ipynb')
        assert not (tmp_path/'run').exists()

def test_infer_notebook(mount, tmp_path):
    assert invoke('ribo_train', 'cfg_demo', '--data', mount/'store.arrow', '--bpp', mount/'bpp', '--run', tmp_path/'a', '--overrides', TINY).exit_code == 0
    nb = ROOT/'nbs'/'05_infer.ipynb'
    r = call('papermill', '--no-progress-bar', nb, tmp_path/'i.ipynb', '-p', 'ckpt', tmp_path/'a', '-p', 'sequences', mount/'test'/'test_sequences.csv', '-p', 'out', tmp_path/'sub.parquet')
    assert r.returncode == 0, r.stderr[-2000:]
    r = invoke('ribo_score', tmp_path/'sub.parquet', mount/'test'/'solution.parquet')
    said = json.loads((tmp_path/'a'/'metrics.json').read_text())['scores']['squeezeformer']['official']
    assert r.exit_code == 0 and abs(float(r.output.splitlines()[-1].split()[3]) - said) < 1e-4
    r = call('papermill', '--no-progress-bar', nb, tmp_path/'j.ipynb', '-p', 'checkpoint', 'x')
    assert r.returncode != 0 and 'its parameters are ckpt, sequences, out, bpps' in r.stderr
