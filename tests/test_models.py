"What every model and every configuration must obey: the contract at full width, switches that change nothing, long RNAs."
import json,subprocess,sys
from dataclasses import asdict,replace
from pathlib import Path
import pytest,torch
from published_ribonanzanet import published
from ribo_nb import mamba
from ribo_nb.mamba import ssd_dense
from ribo_nb.ribonanzanet import RibonanzaNet
from ribo_nb.squeezeformer import check_contract,toy_batch
from ribo_nb.config import build, cfg_from_dict, cfgs, compile_blocks, load_model, model_args, model_class
from ribo_nb.train import Position, Stepper, make_optimizer
from helpers import call,env, loss_of_reactivity

small = dict(d_model=32, n_layer=2, n_head=4, d_state=8, d_pair=16)
pair_track = replace(cfgs['cfg_mamba'], pair_track=True)
every = cfgs | dict(pair_track=pair_track)

@pytest.mark.parametrize('name', every)
def test_contract_at_full_width(name):
    "Padding, batch, order, mask, unpaired nucleotides, gradients, three precisions"
    torch.manual_seed(0)
    check_contract(build(replace(every[name], n_layer=2)))

def gradients(model, batch):
    torch.manual_seed(1)
    model.train().zero_grad()
    pred = model(batch)
    pred[batch['mask']].square().sum().backward()
    return pred.detach(),{n: p.grad.clone() for n,p in model.named_parameters()}

def same(a, b, eps=1e-5):
    torch.testing.assert_close(a[0], b[0], atol=eps, rtol=0)
    top = max(float(g.abs().max()) for g in a[1].values())
    for n,g in a[1].items(): torch.testing.assert_close(g, b[1][n], atol=eps*top, rtol=1e-3, msg=n)

@pytest.mark.parametrize('name', every)
def test_checkpoint_changes_no_gradient(name):
    cfg = replace(every[name], **small, dropout=.1)
    plain,kept = (gradients(build(replace(cfg, checkpoint=c)), toy_batch((50, 21))) for c in (False, True))
    same(plain, kept, 1e-7)

@pytest.mark.parametrize('name', ['cfg_0','cfg_mamba'])
def test_compiled_equals_eager_and_does_not_compile_for_each_length(name):
    "Once for the first length, once for all others, once more where long RNAs take another path"
    torch._dynamo.reset()
    cfg = replace(cfgs[name], **small | dict(n_layer=1), dropout=0.)
    eager,fast,seen = build(cfg),build(cfg),[]
    compile_blocks(fast)
    for lengths in ((61, 40), (75, 33), (120, 90), (150, 149), (206, 177)):
        same(gradients(eager, toy_batch(lengths)), gradients(fast, toy_batch(lengths)))
        seen.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert 0 < seen[2] == seen[-1]

@pytest.mark.parametrize('name,more', [('cfg_0', {}), ('cfg_mamba', {}), ('cfg_seed32', {}), ('cfg_ribonanzanet', dict(n_layer=2)),
                                       ('cfg_mamba', dict(n_layer=2, pair_track=True))])
def test_2000_nt_in_8_GB(name, more):
    "Four million pairs; each layer forgets what the one before needed, so two layers take as much as all"
    code = f'''
import torch
from ribo_nb.squeezeformer import toy_batch
from ribo_nb.config import build, make_cfg
with torch.inference_mode(): assert build(make_cfg({name!r}, {more!r})).eval()(toy_batch((2000,))).isfinite().all()
print(next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))/2**20)
'''
    r = subprocess.run([sys.executable, '-c', code], env=env(), capture_output=True, text=True)
    assert r.returncode == 0 and float(r.stdout) < 8, r.stdout + r.stderr

@pytest.mark.skipif(not (torch.cuda.is_available() and mamba.official_scan), reason='needs a GPU and the package mamba_ssm')
def test_official_kernel_equals_ours():
    torch.manual_seed(0)
    draw = lambda *s: torch.randn(2, 177, *s, device='cuda')
    x,sides = draw(8, 24),[(-draw(8).abs()*.1, draw(8).abs(), draw(32), draw(32)) for _ in range(2)]
    torch.testing.assert_close(mamba.ssd_official(x, *sides), ssd_dense(x, *sides), atol=1e-3, rtol=1e-3)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', every)
def test_gpu_equals_cpu(name):
    cfg = replace(every[name], n_layer=2, dropout=0.)
    a,b = build(cfg).eval(),build(cfg).eval().cuda()
    batch = toy_batch((177, 90))
    with torch.no_grad(): torch.testing.assert_close(b({k: v.cuda() for k,v in batch.items()}).cpu(), a(batch), atol=1e-4, rtol=0)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', ['cfg_0','cfg_mamba','cfg_seed32'])
def test_replayed_steps_equal_eager(name):
    "Recorded once, replayed with other batches: the same losses and weights as step by step"
    cfg,runs = replace(cfgs[name], **small, dropout=0., precision='fp32', lr=1e-4),[]
    for graph in (False, True):
        net = build(cfg).cuda().train()
        optimizer, scaler = make_optimizer(net, cfg, 0), torch.amp.GradScaler('cuda', enabled=False)
        stepper, losses = Stepper(net, loss_of_reactivity(cfg), scaler, torch.float32, record=graph), []
        for seed in range(6):
            torch.manual_seed(seed)
            b = toy_batch((61, 40), seed=seed) | dict(react=torch.rand(2, 61, 2), sn=torch.full((2, 2), 5.), SN_filter=torch.ones(2, 2, dtype=torch.bool))
            losses += stepper.gradient({k: v.cuda() for k,v in b.items()}, optimizer, Position()).tolist()
            torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip_grad)
            optimizer.step()
        assert not graph or len(stepper.recorder.recorded) == 1
        runs.append((torch.tensor(losses), {k: v.cpu() for k,v in net.state_dict().items() if 'running' not in k}))
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-4, rtol=0)
    for k,v in runs[0][1].items(): torch.testing.assert_close(v, runs[1][1][k], atol=1e-3, rtol=0, msg=k)

def test_ribonanzanet_equals_the_published_arithmetic():
    "Forward and in its gradients, for an RNA alone"
    torch.manual_seed(0)
    net = RibonanzaNet(d_model=32, n_layer=3, n_head=4, d_pair=16).eval()
    ours, theirs = (forward(toy_batch((40,))) for forward in (net, lambda batch: published(net, batch)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    a, b = (torch.autograd.grad(y.square().sum(), net.encoder.weight)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-4*float(b.abs().max()), rtol=0)


@pytest.mark.parametrize('name', every)
def test_any_number_of_channels(name):
    cfg = replace(every[name], **small, dropout=0.)
    model = model_class(cfg)(**model_args(cfg), n_channel=3)
    assert model(toy_batch((20, 9))).shape == (2, 20, 3)


def test_a_checkpoint_of_version_4_predicts_as_it_did():
    "It was written at cc70475, with fields of Cfg that are gone since"
    old = Path(__file__).parent/'old'
    expected = json.loads((old/'expected.json').read_text())
    model, cfg = load_model(old/'best_v4.pt')
    batch = toy_batch((17, 9))
    batch['bpp'] = torch.zeros_like(batch['bpp'])
    batch['seq'] = torch.tensor(expected['seq'])
    with torch.no_grad():
        pred = model.eval()(batch)[0, :17]
    torch.testing.assert_close(pred, torch.tensor(expected['pred']), atol=1e-5, rtol=0)
    assert cfg.d_model == 8


@pytest.mark.parametrize('field', ['shard', 'gru', 'is_good', 'quirks'])
def test_a_configuration_with_a_switch_that_is_gone_is_refused(field):
    old = asdict(cfgs['cfg_demo'])
    assert cfg_from_dict(old | {field: False}) == cfgs['cfg_demo']
    with pytest.raises(ValueError, match=f'Cfg.{field} was on'):
        cfg_from_dict(old | {field: True})


def test_sixteen_channels_in_bf16_come_to_an_end():
    "oneDNN (torch 2.13, CPU) hangs in a bf16 depthwise convolution of 16 channels and 17 nt; ours goes round it"
    code = """import torch
from ribo_nb.squeezeformer import DepthwiseConv
x = torch.randn(3, 57, 16, requires_grad=True)
with torch.autocast('cpu', torch.bfloat16): y = DepthwiseConv(16, 17)(x)
y.sum().backward(); assert torch.isfinite(x.grad).all()"""
    assert call(sys.executable, '-c', code, timeout=120).returncode == 0
