"What a prediction is made with, and what it says about itself: official weights, warnings, figures, report."
import json
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow.csv as pv
import pytest
import torch
from dataclasses import replace
from helpers import TINY,invoke
from ribo_nb import bpp, config, convert, ensemble, infer, jobs, train
from ribo_nb.data import FLANK3,FLANK5,Store,shown
from ribo_nb.ensemble import novelties as outside
from ribo_nb.infer import drawn_share, load, predict
from published_ribonanzanet import official_state,published
from ribo_nb.ribonanzanet import RibonanzaNet
from ribo_nb.squeezeformer import toy_batch
from ribo_nb.structure import dot_bracket,layout,partners,place_numbers,plot_structure
from ribo_nb.config import OFFICIAL, load_model


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    "A file of weights with the names and shapes of the official RibonanzaNet.pt, and the network that they belong to"
    torch.manual_seed(0)
    net = RibonanzaNet().eval()
    path = tmp_path_factory.mktemp('official')/'RibonanzaNet.pt'
    torch.save(official_state(net), path)
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
    config.save(tmp_path/'other.pt', cfg, model=config.build(cfg).state_dict())
    model = load([official[0], tmp_path/'other.pt'], 'cpu')
    assert {c.engine_params for c in model.cfgs} == {'12345678'}


def test_training_begins_with_official_weights(official, mount, tmp_path):
    path,net = official
    begun = train.first_model(replace(OFFICIAL, start=str(path), device='cpu')).state_dict()
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in begun.items())
    args = '--data',mount/'store.arrow','--bpp',mount/'bpp','--run',tmp_path/'run'
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
    assert 'squeezeformer.pt of ribo_nb' in r.output and 'was trained without flips' in r.output
    assert 'leave --flip away' in r.output

TRNA = 'GCGGAUUUAGCUCAGUUGGGAGAGCGCCAGACUGAAGAUCUGGAGGUCCUGUGUUCGAUCCACAGAAUUCGCACCA'
INSIDE = FLANK5 + 'GGCAAGGCUUUACGCUAGGAUUCGAUUGCACGUAUCCUAGCGAAAGCUUAGCCUUGCAUAUUCGUAUGC' + FLANK3
RANGE = dict(shortest=115, longest=170, start=26, end=20, triplets=.46875)


@pytest.mark.parametrize('text,more,why', [
    ('>a\nGGGAAACCC\n>b\nACGNACGU\n', [], 'record 2 (b)'),
    ('>a\nGGGAAACCC\n', ['--measured', 'gone.parquet'], 'gone.parquet: no such file'),
    ('>a\nGGGAAACCC\n', ['--merge'], 'nothing to merge')])
def test_files_are_checked_before_models_are_loaded(text, more, why, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError('loaded')
    monkeypatch.setattr(ensemble, 'load', never)
    (tmp_path/'x.fa').write_text(text)
    r = invoke('ribo_infer', tmp_path/'x.fa', '--out', tmp_path/'o.csv', *more)
    assert r.exit_code == 1 and why in r.output, r.output


def test_what_is_new_to_the_models():
    assert outside(INSIDE, RANGE) == {}
    assert outside('A', RANGE).keys() == {'length','ends'}
    assert '46 of 76 positions never learnt' in outside(TRNA, RANGE)['ends']
    assert outside(FLANK5 + 'GCAUGCUUAGGCAUC'*20 + FLANK3, RANGE).keys() == {'length'}
    assert outside('A'*130, RANGE).keys() == {'ends','composition'}
    assert outside(FLANK5 + 'CAG'*30 + FLANK3, RANGE).keys() == {'composition'}
    assert outside('GGGAAACCC', dict(shortest=5, longest=9, start=0, end=0, triplets=0.)) == {}


@pytest.fixture(scope='module')
def shipped_run(tmp_path_factory):
    "A tRNA, a lone A and two RNAs like those learnt from, by the shipped weights, with two of four drawn"
    d = tmp_path_factory.mktemp('shipped')
    source = fasta(d/'x.fa', TRNA, 'A', INSIDE, INSIDE[:40] + 'A' + INSIDE[41:])
    drawn = '--figures',d/'figures','--report',d/'r.html','--figures-most',2
    r = invoke('ribo_infer', source, '--out', d/'o.parquet', '--device', 'cpu', *drawn)
    assert r.exit_code == 0, r.output
    return d,r


def test_warnings_are_in_the_table_and_said_once(shipped_run):
    d,r = shipped_run
    t = pd.read_parquet(d/'o.parquet')
    assert (t.warning != '').tolist() == [True, True, False, False]
    assert '76 nt, learnt from 115 to 170 nt' in t.warning[0]
    said = [line for line in r.stderr.splitlines() if 'are outside what these models have learnt from' in line]
    assert len(said) == 1 and said[0].startswith('2 of 4 RNAs'), r.stderr
    for kind in ('low','high'):
        for m in ('2A3','DMS'):
            blank = t[f'{kind}_{m}_MaP'].map(lambda x: int(np.isnan(x).sum()))
            assert blank.tolist() == [46, 1, 46, 46]
    assert all(np.isfinite(np.concatenate(t[f'reactivity_{m}_MaP'])).all() for m in ('2A3','DMS'))


def test_csv_and_rdat_have_the_warnings(shipped_run, tmp_path):
    t = pd.read_parquet(shipped_run[0]/'o.parquet')
    pv.write_csv(jobs.by_position(t), tmp_path/'o.csv')
    rows = pd.read_csv(tmp_path/'o.csv', keep_default_na=False)
    assert rows.warning[rows.name == 'r1'].unique().tolist() == [t.warning[0]]
    assert (rows.warning[rows.name == 'r3'] == '').all()
    assert (rows.low_2A3_MaP[rows.name == 'r1'] == '').sum() == 46
    jobs.write_rdat(t, tmp_path/'o.rdat')
    assert t.warning[0] in (tmp_path/'o.rdat').read_text()
    assert convert.read_rdat(tmp_path/'o.rdat').sequence.tolist() == t.sequence.tolist()


def test_report_says_what_it_leaves_out(shipped_run):
    d,r = shipped_run
    drawn = {p.name.split('_')[0] for p in (d/'figures').glob('0*.png')}
    assert drawn == {'01','02'} and '2 of 4 RNAs one by one' in r.output and '--figures-most' in r.output
    page = (d/'r.html').read_text()
    assert 'rawn are 2 of 4 RNAs one by one' in page and '2 of 4 RNAs are outside' in page
    assert '46 of 76 positions never learnt' in page and 'squeezeformer.pt of ribo_nb' in page
    assert str(ensemble.SHIPPED.parent) not in page and str(d) not in page


def test_all_are_drawn_when_they_are_few():
    assert drawn_share(4, 4, 20) == ''
    assert drawn_share(25, 25, 20) == 'drawn are 20 of 25 RNAs one by one: --figures-most 25 draws more'
    assert 'the first 300 in table and heat map' in drawn_share(5000, 300, 20)


def test_a_run_remembers_what_it_has_seen(mount, tmp_path):
    r = invoke('ribo_train', 'cfg_demo', '--data', mount/'store.arrow', '--bpp', mount/'bpp', '--run', tmp_path/'run', '--overrides', TINY)
    assert r.exit_code == 0, r.output
    model = load(tmp_path/'run', 'cpu')
    length = Store(mount/'store.arrow').rows.sequence.str.len()
    seen = {k: model.seen[k] for k in ('shortest','longest','start','end')}
    assert seen == dict(shortest=length.min(), longest=length.max(), start=26, end=20)
    assert '9 nt' in predict(model, 'GGGAAACCC').warning[0]
    unknown = load(tmp_path/'run'/'last.pt', 'cpu')
    assert unknown.seen is None and 'warning' not in predict(unknown, 'GGGAAACCC')
    assert load([tmp_path/'run', tmp_path/'run'/'last.pt'], 'cpu').seen is None
    # a submission keeps its three columns, and its lengths are told about
    test = pd.DataFrame(dict(id_min=[0, 9], id_max=[8, 20], sequence_id=['a','b'], sequence=['GGGAAACCC','GGGAAACCCAAA']))
    test.to_csv(tmp_path/'test.csv', index=False)
    r = invoke('ribo_infer', tmp_path/'test.csv', '--ckpt', tmp_path/'run', '--out', tmp_path/'s.csv')
    assert r.exit_code == 0 and '2 of 2 RNAs are outside' in r.output, r.output
    assert pd.read_csv(tmp_path/'s.csv').columns.tolist() == ['id','reactivity_DMS_MaP','reactivity_2A3_MaP']


def test_an_ensemble_has_seen_what_any_member_has(tmp_path):
    cfg = config.make_cfg('cfg_demo', json.loads(TINY))
    weights = config.build(cfg).state_dict()
    config.save(tmp_path/'a.pt', cfg, model=weights, seen=RANGE)
    config.save(tmp_path/'b.pt', cfg, model=weights, seen=RANGE | dict(longest=300, start=0))
    assert load([tmp_path/'a.pt', tmp_path/'b.pt'], 'cpu').seen == RANGE | dict(longest=300, start=0)


def test_structure_has_its_title_and_numbers_clear_of_nucleotides():
    rng = np.random.default_rng(5)
    rnas = ['A', 'GGGAAACCC', TRNA, INSIDE, ''.join(rng.choice(list('ACGU'), 250))]
    title = 'a name as long as those of databases are: minimum free energy with the predicted 2A3 as evidence'
    for s in rnas:
        structure = dot_bracket(s)
        fig = plot_structure(s, structure, np.full(len(s), .5), title).figure
        fig.canvas.draw()
        box,page = fig._suptitle.get_window_extent(),fig.bbox
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1, len(s)
        plt.close(fig)
        xy = layout(structure)
        numbers = sorted({0, *range(9, len(s)-4, 10), len(s)-1})
        spots,sizes = place_numbers(xy, partners(structure), numbers, 14.)
        gap = (np.abs(spots[:,None] - xy) - sizes[:,None]/2).clip(0)
        assert np.hypot(*gap.transpose(2, 0, 1)).min() > 10.25, len(s)  # 20.5 units is a disc


def test_the_wait_for_the_compiler_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(bpp, 'is_compiled', lambda: False)
    bpp.Native().prepare()
    assert 'compiling the folding engine' in capsys.readouterr().err
    monkeypatch.undo()
    assert bpp.is_compiled()
    bpp.Native().prepare()
    assert not capsys.readouterr().err


def test_paths_of_the_project_are_shown_relative(monkeypatch, tmp_path):
    project = tmp_path/'project'
    (project/'nbs').mkdir(parents=True)
    (project/'settings.ini').touch()
    monkeypatch.chdir(project/'nbs')
    assert shown(project/'datamount'/'x.parquet') == '../datamount/x.parquet'
    assert shown(tmp_path/'x.parquet') == str(tmp_path/'x.parquet') and shown('y/x') == 'y/x'
