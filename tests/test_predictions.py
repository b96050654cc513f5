"What a prediction is made with, and what it says about itself: official weights, warnings, figures, report."
import json
import numpy as np
import pandas as pd
import pytest
import torch
from dataclasses import replace
from helpers import TINY,invoke
from ribo_nb import train
from ribo_nb.infer import load
from ribo_nb.mamba import RibonanzaNet,published
from ribo_nb.squeezeformer import toy_batch
from ribo_nb.train import OFFICIAL,load_model


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    "A file of weights with the names and shapes of the official RibonanzaNet.pt, and the network that they belong to"
    torch.manual_seed(0)
    net = RibonanzaNet(quirks=True).eval()
    path = tmp_path_factory.mktemp('official')/'RibonanzaNet.pt'
    torch.save(net.state_dict(), path)
    return path,net


def fasta(path, *sequences):
    path.write_text(''.join(f'>r{k}\n{s}\n' for k,s in enumerate(sequences, 1)))
    return path


def test_official_weights_predict(official, tmp_path):
    "`ribo_infer --ckpt RibonanzaNet.pt` gives what the published arithmetic gives for the RNA alone, and takes --flip"
    path,net = official
    batch = toy_batch((30,))
    with torch.no_grad():
        want = published(net, batch)[0].clamp(0, 1).numpy()
    rna = ''.join('-ACGU'[i] for i in batch['seq'][0])
    source = fasta(tmp_path/'x.fa', rna)
    for name,more in (('plain', []), ('flip', ['--flip'])):
        out = tmp_path/f'{name}.parquet'
        r = invoke('ribo_infer', source, '--ckpt', path, '--out', out, '--no-structure', '--device', 'cpu', *more)
        assert r.exit_code == 0, r.output
        t = pd.read_parquet(out)
        got = np.stack([t.reactivity_2A3_MaP[0], t.reactivity_DMS_MaP[0]], 1)
        assert (np.abs(got - want).max() <= 1e-5) == (name == 'plain')


def test_official_weights_beside_a_run(official, tmp_path):
    "They read no base-pair probabilities, so they go with a run whatever engine that was trained on"
    cfg = replace(OFFICIAL, model='squeezeformer', d_model=16, n_layer=1, engine_params='12345678')
    train.save(tmp_path/'other.pt', cfg, model=train.build(cfg).state_dict())
    model = load([official[0], tmp_path/'other.pt'], 'cpu')
    assert {c.engine_params for c in model.cfgs} == {'12345678'}


def test_training_begins_with_official_weights(official, mount, tmp_path):
    path,net = official
    begun = train._fresh(replace(OFFICIAL, start=str(path), device='cpu')).state_dict()
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in begun.items())
    args = '--data',mount/'store.parquet','--bpp',mount/'bpp','--run',tmp_path/'run'
    for start,why in ((path, 'start cfg_ribonanzanet with them'), (tmp_path/'gone.pt', 'no such checkpoint')):
        r = invoke('ribo_train', 'cfg_demo', *args, '--overrides', json.dumps(json.loads(TINY) | dict(start=str(start))))
        assert r.exit_code == 1 and why in r.output and not (tmp_path/'run').exists(), r.output


def test_other_files_of_pytorch_are_refused_in_words(official, tmp_path):
    torch.save(dict(epoch=3, model_state_dict=official[1].state_dict()), tmp_path/'wrapped.pt')
    torch.save([1, 2], tmp_path/'list.pt')
    (tmp_path/'cut.pt').write_bytes(official[0].read_bytes()[:-5000])
    data = bytearray(official[0].read_bytes())
    data[len(data)//100:len(data)//100+50_000] = bytes(50_000)
    (tmp_path/'torn.pt').write_bytes(data)
    for name in ('wrapped.pt','list.pt','cut.pt','torn.pt'):
        with pytest.raises(ValueError, match=name):
            load_model(tmp_path/name)


def test_flip_with_shipped_weights_explains_itself(tmp_path):
    r = invoke('ribo_infer', fasta(tmp_path/'x.fa', 'GGGAAACCC'), '--out', tmp_path/'o.csv', '--flip', '--device', 'cpu')
    assert r.exit_code == 1 and not (tmp_path/'o.csv').exists()
    assert 'squeezeformer.pt of ribo_nb was trained without flips' in r.output and 'leave --flip away' in r.output
