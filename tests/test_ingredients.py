"""Every field of Cfg that changes training does so, and as it should: against steps computed by hand where that is possible.

A run is watched from outside, through PyTorch's own hooks, so that nothing here knows how the loop is written."""
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers import invoke, loss_of_reactivity
from ribo_nb import config, tasks, train
from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore
from ribo_nb.convert import write_store
from ribo_nb.data import CHANNEL_FIELDS, MODS, Store, block_of, sequence_id, store_schema, wide_columns
from ribo_nb.data import write_blocks
from ribo_nb.squeezeformer import toy_batch
from ribo_nb.config import Cfg, build, load_checkpoint, load_model, make_cfg
from ribo_nb.metric import official_mae
from ribo_nb.tasks import predict_rows
from ribo_nb.trackers import tracking
from ribo_nb.train import COSTS, STOPPED, Stopped, train_run

TINY = dict(d_model=16, n_layer=1, n_head=2, n_epoch=2, batch_size=1, device='cpu', precision='fp32', clip_grad=1e9)
COVERED = set()


def covers(*names):
    "Marks a test as one that fails when these fields of Cfg are ignored"
    COVERED.update(names)
    return lambda test: test


# ---------------------------------------------------------------- what is trained on, and how it is watched

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A store of 24 RNAs of 20 to 28 nt, four of them measured twice, and their BPPs"
    folder, rng, rows, values = tmp_path_factory.mktemp('ingredients'), np.random.default_rng(0), [], []
    sequences = [''.join(rng.choice(list('ACGU'), 20 + k % 9)) for k in range(24)]
    for k, s in enumerate(sequences + sequences[:4]):
        for mod in MODS:
            sn = rng.choice([.4, 2, 5, 14])
            rows.append(dict(sequence_id=sequence_id(s), sequence=s, experiment_type=f'{mod}_MaP',
                             dataset_name=f'set{k // 24}_{mod}', reads=500, signal_to_noise=sn, SN_filter=sn > 1))
            react = np.full((2, 28), np.nan)
            react[0, 2:len(s)] = rng.uniform(-.3, 1.3, len(s) - 2)
            react[1, 2:len(s)] = .1
            values.append(react)
    names = [n for group in wide_columns(28) for n in group]
    table = pd.DataFrame(np.stack(values).reshape(len(values), -1), columns=names)
    pd.concat([pd.DataFrame(rows), table], axis=1).to_parquet(folder/'raw.parquet')
    write_store(folder/'raw.parquet', folder/'store.arrow')
    BppStore(folder/'bpp').fill(sequences, n_jobs=1)
    return folder


class Tape:
    "What a run did: the batches that its model saw in training, and its optimizer's steps"

    def __init__(self):
        self.batches, self.steps, self.dtypes, self.zeros, self.model = [], [], set(), [], None

    def before_module(self, module, args):
        if args and isinstance(args[0], dict) and 'react' in args[0]:
            self.model = module
            self.batches.append({k: v.clone() for k, v in args[0].items()})

    def after_module(self, module, args, out):
        if isinstance(module, nn.Linear) and module.training:
            self.dtypes.add(out.dtype)
        if isinstance(module, nn.Dropout) and module.training:
            self.zeros.append(float((out == 0).float().mean()))

    def before_step(self, opt, args, kwargs):
        group = opt.param_groups[0]
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        step = dict(kind=type(opt).__name__, lr=group['lr'], grads=grads, before=self.weights())
        self.steps.append(types.SimpleNamespace(**step))

    def after_step(self, opt, args, kwargs):
        self.steps[-1].after = self.weights()

    def weights(self):
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    @contextlib.contextmanager
    def __call__(self):
        with contextlib.ExitStack() as stack:
            for add, what in ((register_module_forward_pre_hook, self.before_module),
                              (register_module_forward_hook, self.after_module),
                              (register_optimizer_step_pre_hook, self.before_step),
                              (register_optimizer_step_post_hook, self.after_step)):
                stack.callback(add(what).remove)
            yield self

    @property
    def rates(self):
        return [s.lr for s in self.steps]

    def sequences(self, batches=None):
        "Of the RNAs in these batches, in their order"
        return [''.join('-ACGU'[i] for i in s[m].tolist()) for b in (batches or self.batches)
                for s, m in zip(b['seq'], b['mask'], strict=True)]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    "Overrides → the tape of a whole run; each is trained once"
    def run(**overrides):
        tape, out = Tape(), tmp_path_factory.mktemp('run')
        with tape():
            metrics = train_run(make_cfg('cfg_demo', TINY | overrides), data/'store.arrow', out, data/'bpp', brief=True)
        tape.out, tape.metrics, tape.best = out, metrics, load_checkpoint(out/'best.pt')
        tape.log = [json.loads(line) for line in (out/'log.jsonl').read_text().splitlines()]
        return tape
    return functools.cache(run)


def same(a, b, eps=1e-6):
    return all(torch.allclose(a[k], b[k], atol=eps, rtol=0) for k in a)


def norm(grads):
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


# ---------------------------------------------------------------- the loss and the optimizer

WEIGHTS = {'none': lambda sn, good: torch.ones_like(sn), 'SN_filter': lambda sn, good: good.float(),
           'log1p': lambda sn, good: torch.log(1 + sn.clamp(0, 10)), 'clip': lambda sn, good: sn.clamp(0, 1)}


@covers('weight')
@pytest.mark.parametrize('kind', WEIGHTS)
def test_signal_to_noise_weighs_the_loss(trained, kind):
    "The first step's gradient is that of the weighted loss, computed here"
    tape = trained(weight=kind)
    batch, cfg = tape.batches[0], tape.best['cfg']
    model = build(cfg).train()
    model.load_state_dict(tape.steps[0].before)
    weight = WEIGHTS[kind](batch['sn'], batch['SN_filter'])[:, None] * ~batch['react'].isnan()  # b l m
    error = (model(batch) - batch['react'].nan_to_num().clamp(0, 1)).abs()
    ((weight * error).sum() / weight.sum()).backward()
    assert same(tape.steps[0].grads, {n: p.grad for n, p in model.named_parameters()})


@covers('lr', 'weight_decay')
@pytest.mark.parametrize('rate,decay', [(.003, .01), (.003, .5), (.02, 0.)])
def test_adamw_step_by_hand(trained, rate, decay):
    "Decay is decoupled from the gradient; matrices shrink, vectors do not"
    step = trained(lr=rate, weight_decay=decay, warmup=0.).steps[0]
    assert step.lr == rate
    for name, g in step.grads.items():
        old = step.before[name] * (1 - rate * decay * (g.ndim > 1))
        torch.testing.assert_close(step.after[name], old - rate * g / (g.abs() + 1e-8), atol=1e-6, rtol=1e-4)


@covers('clip_grad')
def test_gradient_is_clipped_to_its_norm(trained):
    free, clipped = trained().steps[0].grads, trained(clip_grad=.01).steps[0].grads
    assert norm(free) > .1 and norm(clipped) == pytest.approx(.01, rel=1e-3)
    assert same({n: g * (.01 / norm(free)) for n, g in free.items()}, clipped)


def cosine(k, warm, total):
    return (k + 1) / warm if k < warm else (1 + math.cos(math.pi * (k - warm) / (total - warm))) / 2


def onecycle(k, warm, total):
    if k < warm:
        return 1 / 25 + 24 / 25 * (1 - math.cos(math.pi * (k + 1) / warm)) / 2
    return max((1 + math.cos(math.pi * (k - warm) / (total - warm))) / 2, 1e-4)


@covers('schedule', 'warmup')
@pytest.mark.parametrize('schedule', [cosine, onecycle])
@pytest.mark.parametrize('warmup', [.3, .6])
def test_learning_rate_of_every_step(trained, schedule, warmup):
    rates = trained(schedule=schedule.__name__, warmup=warmup, lr=.01).rates
    warm = int(warmup * len(rates))
    assert warm > 1 and rates == pytest.approx([.01 * schedule(k, warm, len(rates)) for k in range(len(rates))])


@covers('ema')
def test_running_average_predicts(trained, data):
    "Averaged by hand over all steps; best.pt holds it, and its score is that of the run"
    tape = trained(ema=.3)
    hand = dict(tape.steps[0].before)
    for n, step in enumerate(tape.steps, 1):
        keep = min(.3, n / (n + 9))
        hand = {k: keep * hand[k] + (1 - keep) * step.after[k] for k in hand}
    assert same(tape.best['model'], hand) and same(tape.best['raw'], tape.steps[-1].after, 0)
    assert not same(tape.best['model'], tape.best['raw'], 1e-4)
    assert same(trained().best['model'], trained().steps[-1].after, 0)  # without: the last weights
    for run in (tape, trained()):
        store, (model, _) = Store(data/'store.arrow'), load_model(run.out/'best.pt')
        rows = tasks.held_out(store, 0)
        scores = [(p, store[i][0], store.SN_filter[i]) for p, i in
                  zip(predict_rows(model, store, BppStore(data/'bpp'), rows), rows, strict=True)]
        wrong = sum(official_mae(p[None], y[None], g[None]) * (~np.isnan(y).any(1)).sum() for p, y, g in scores if g.all())
        count = sum((~np.isnan(y).any(1)).sum() for _, y, g in scores if g.all())
        assert run.metrics['scores']['squeezeformer']['official'] == pytest.approx(wrong / count, abs=1e-5)
        assert run.log[-1]['mae'] == pytest.approx(wrong / count, abs=1e-5)


@covers('sgd_epochs', 'sgd_lr')
def test_sgd_at_the_end_by_hand(trained):
    "The first step of SGD, and the plain mean of all weights that it passes through"
    tape = trained(sgd_epochs=2, sgd_lr=.02, n_epoch=1, weight_decay=.1)
    last = [s for s in tape.steps if s.kind == 'SGD']
    assert len(last) == 2 * len(tape.steps) / 3 and {s.lr for s in last} == {.02}
    for name, g in last[0].grads.items():
        old = last[0].before[name]
        torch.testing.assert_close(last[0].after[name], old - .02 * (g + .1 * old * (g.ndim > 1)), atol=1e-6, rtol=0)
    assert same(tape.best['model'], {k: torch.stack([s.after[k] for s in last]).mean(0) for k in last[0].after})
    assert {s.kind for s in trained().steps} == {'AdamW'}


@covers('accumulate')
def test_batch_in_parts_is_the_same_step(trained):
    whole, parts = trained(), trained(accumulate=3)
    assert len(parts.steps) == len(whole.steps) and len(parts.batches) > 2 * len(whole.batches)
    assert same(whole.steps[0].grads, parts.steps[0].grads)
    assert sorted(parts.sequences()) == sorted(whole.sequences())


# ---------------------------------------------------------------- what is read

def halves(tape):
    "The batches of the first epoch, and of the second"
    n = len(tape.batches) // 2
    return tape.batches[:n], tape.batches[n:]


@covers('flip')
def test_half_of_the_RNAs_are_read_backwards(trained):
    "Sequence, profile and BPP of an RNA together; others in the next epoch"
    flipped = []
    for plain, turned in zip(halves(trained()), halves(trained(flip=True)), strict=True):
        flipped.append({})
        for a, b in zip(plain, turned, strict=True):
            for k, n in enumerate(a['mask'].sum(1).tolist()):
                back = not torch.equal(a['seq'][k], b['seq'][k])
                for what, axes in (('seq', [0]), ('react', [0]), ('bpp', [0, 1])):
                    x, y = (t[what][k, :n, :n] if what == 'bpp' else t[what][k, :n] for t in (a, b))
                    want = x.flip(axes) if back else x
                    torch.testing.assert_close(y, want, atol=0, rtol=0, equal_nan=True)
                flipped[-1][tuple(a['seq'][k, :n].tolist()), float(a['sn'][k, 0])] = back
    assert all(.2 < np.mean(list(f.values())) < .8 for f in flipped) and flipped[0] != flipped[1]


@covers('one_each')
def test_one_measurement_of_each_sequence(trained):
    every, one = trained(), trained(one_each=True)
    first, second = halves(one)
    assert len(every.sequences(halves(every)[0])) > len(set(every.sequences()))
    for part in (first, second):
        assert sorted(one.sequences(part)) == sorted(set(every.sequences()))
    measured = [{s: float(n) for s, n in zip(one.sequences(p), torch.cat([b['sn'][:, 0] for b in p]), strict=True)}
                for p in (first, second)]
    assert measured[0] != measured[1]  # another one in the next epoch


@covers('fold')
@pytest.mark.parametrize('fold', [-1, 0, 2])
def test_the_held_out_fold_is_not_seen(trained, data, fold):
    rows = Store(data/'store.arrow').rows
    tape = trained(fold=fold)
    assert set(tape.sequences()) == set(rows.sequence[rows.fold != fold])
    assert ('scores' in tape.metrics) == (fold >= 0)


@covers('n_epoch', 'batch_size')
def test_epochs_and_size_of_batches(trained):
    "A batch holds as many padded positions as `batch_size` RNAs of 177 nt have"
    one, two, wide = trained(n_epoch=1), trained(), trained(batch_size=2)
    assert len(two.steps) == 2 * len(one.steps) and two.sequences(halves(two)[0]) == one.sequences()
    assert sorted(one.sequences()) == sorted(wide.sequences(halves(wide)[0])) and len(wide.steps) < len(two.steps)
    for tape, size in ((two, 1), (wide, 2)):
        padded = [b['mask'].numel() for b in tape.batches]
        assert max(padded) <= size * 177 and max(padded) > size * 177 * .7


@covers('seed')
def test_seed_draws_weights_order_and_dropout(trained):
    a, b, again = trained(dropout=.2), trained(dropout=.2, seed=1), trained(dropout=.2, accumulate=1)
    assert not same(a.steps[0].before, b.steps[0].before, 1e-3) and a.sequences() != b.sequences()
    assert same(a.steps[-1].after, again.steps[-1].after, 0)


@covers('engine', 'engine_params')
@pytest.mark.parametrize('more,name,params', [({}, 'native', None), (dict(engine='vienna'), 'vienna', None),
                                              (dict(engine_params='1421e89c'), 'native', 'eternafold')])
def test_base_pair_probabilities_come_from_the_engine(trained, more, name, params):
    "And the run records with which parameters"
    tape, fold = trained(**more), engine(name, params)
    for rna, seq in enumerate(tape.sequences(tape.batches[:1])):
        here = tape.batches[0]['bpp'][rna, :len(seq), :len(seq)].numpy()
        assert np.abs(here - fold(seq)).max() < 2e-3
    assert tape.best['cfg'].engine_params == fold.key['params']
    assert json.loads((tape.out/'cfg.json').read_text())['cfg']['engine_params'] == fold.key['params']


@covers('start')
def test_first_weights_come_from_a_checkpoint(trained):
    old = trained()
    assert same(trained(start=str(old.out/'best.pt')).steps[0].before, old.best['model'], 0)
    assert not same(old.steps[0].before, old.best['model'], 1e-4)


# ---------------------------------------------------------------- how it is computed

@covers('precision')
@pytest.mark.parametrize('precision,dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_precision_of_products(trained, precision, dtype):
    "The head stays in fp32; fp16 has its loss scaled"
    tape = trained(precision=precision)
    assert tape.dtypes == {torch.float32, dtype} and {w.dtype for w in tape.best['model'].values()} == {torch.float32}
    assert bool(load_checkpoint(tape.out/'last.pt')['scaler']) == (precision == 'fp16')
    assert same(tape.best['model'], trained().best['model'], .01) and tape.metrics['machine'].endswith(str(dtype)[6:])


@covers('device')
def test_device(trained, monkeypatch):
    assert {w.device.type for w in trained().model.state_dict().values()} == {'cpu'}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='PyTorch sees no GPU'):
        train.resolve(make_cfg('cfg_demo', TINY | dict(device='cuda')))


@covers('compile')
def test_blocks_are_compiled(trained, monkeypatch):
    "Every pass through a block goes through what torch.compile made of it; that it is right is test_models' matter"
    calls = []

    def note(function, **how):
        return lambda *args, **kw: calls.append(function) or function(*args, **kw)

    monkeypatch.setattr(torch, 'compile', note)
    plain, passes = trained(n_layer=3, n_epoch=1), []
    assert not calls
    hook = register_module_forward_hook(lambda module, *_: passes.append(type(module).__name__))
    tape = trained(n_layer=3, n_epoch=1, compile=True)
    hook.remove()
    assert len(calls) == passes.count('SqueezeformerBlock') > 0
    assert same(tape.best['model'], plain.best['model'], 0)


MODELS = {'squeezeformer': {}, 'mamba': {}, 'pair track': dict(model='mamba', pair_track=True, d_pair=8),
          'ribonanzanet': dict(d_pair=8), 'seed32': {}}


def model_cfg(name, **more):
    return make_cfg('cfg_demo', dict(d_model=16, n_head=2, n_layer=2, model=name) | MODELS[name] | more)


def kept_bytes(cfg, batch):
    "Bytes that autograd holds for the backward pass; the gradients"
    total = []

    def keep(tensor):
        total.append(tensor.nbytes)
        return tensor

    model = build(cfg).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch).square().sum()
    loss.backward()
    return sum(total), {n: p.grad for n, p in model.named_parameters()}


@covers('checkpoint')
@pytest.mark.parametrize('name', MODELS)
def test_checkpoint_keeps_less_and_says_the_same(name):
    batch = toy_batch((40, 31))
    (plain, g), (less, g2) = (kept_bytes(model_cfg(name, n_layer=4, checkpoint=c), batch) for c in (False, True))
    assert less < plain / 2
    assert all(torch.allclose(g[k], g2[k], atol=1e-5 * float(g[k].abs().max() + 1)) for k in g)


def test_a_run_checkpoints_its_blocks(trained):
    totals = []
    for checkpoint in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            tape = trained(n_layer=3, n_epoch=1, checkpoint=checkpoint)
        totals.append((sum(kept), tape.best['model']))
    (plain, a), (less, b) = totals
    assert less < plain / 2 and same(a, b, 1e-5)


@covers('graph')
def test_recorded_steps(trained):
    "On a CPU nothing is recorded; what is recorded takes the place of forward and backward, unless the batch is in parts"
    assert same(trained(graph=True).best['model'], trained().best['model'], 0)
    cfg, batch, seen = make_cfg('cfg_demo', TINY | dict(clip_grad=3.)), trained().batches[0], []
    model, task = build(cfg), loss_of_reactivity(cfg)
    optimizer, scaler = train.make_optimizer(model, cfg, 0), torch.amp.GradScaler('cpu', enabled=False)
    stepper = train.Stepper(model, task, scaler, torch.float32, record=False)

    def recorder(batch):
        seen.append(batch)
        return train.forward_backward(model, task, batch, scaler, torch.float32)

    stepper.recorder = recorder
    for n_part in (1, 2):
        stepper.gradient(batch, optimizer, train.Position(n_part=n_part))
    assert len(seen) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_run_on_a_gpu_records_its_steps(trained, monkeypatch):
    recorded = []
    record = train.Recorder.record
    monkeypatch.setattr(train.Recorder, 'record', lambda self, batch: recorded.append(1) or record(self, batch))
    trained(device='cuda', n_epoch=8)
    assert not recorded
    trained(device='cuda', n_epoch=8, graph=True)
    assert recorded


# ---------------------------------------------------------------- when it saves, scores and stops

@pytest.fixture
def clock(monkeypatch):
    "A clock that only training moves: each optimizer step takes half a minute"
    now = [0.]
    monkeypatch.setattr(train, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))

    def step(*_):
        now[0] += 30

    hook = register_optimizer_step_post_hook(step)
    yield now
    hook.remove()


def saves(monkeypatch):
    "Steps after which last.pt was written"
    steps, save = [], train.save

    def note(path, cfg, **state):
        save(path, cfg, **state)
        if 'position' in state:
            steps.append(state['position']['step'])

    monkeypatch.setattr(train, 'save', note)
    return steps


@covers('save_minutes')
@pytest.mark.parametrize('minutes,want', [(1.2, [3, 6, 8]), (9., [8]), (0., [1, 2, 3, 4, 5, 6, 7, 8, 8])])
def test_minutes_between_checkpoints(trained, clock, monkeypatch, minutes, want):
    "Each step takes half a minute here; the last epoch saves in any case"
    steps = saves(monkeypatch)
    tape = trained.__wrapped__(save_minutes=minutes, score_every=9)
    assert len(tape.steps) == 8 and steps == want


@covers('score_every')
def test_epochs_between_scores(trained):
    for tape, want in ((trained(), [1, 2]), (trained(n_epoch=3, score_every=2), [2, 3])):
        assert [line['epoch'] for line in tape.log if 'mae' in line] == want


@covers('time_budget')
def test_time_budget_stops_in_time_and_goes_on(data, tmp_path, clock, monkeypatch):
    "The sixth step is the first beyond the budget; the second start has one of its own and goes on where the first ended"
    monkeypatch.setattr(tasks.ReactivityTask, 'draw', lambda *_: None)
    budget = (5 * 30 + 20) / 3600 / .95
    o = json.dumps(TINY | dict(n_epoch=4, time_budget=budget, score_every=9))
    args = ('ribo_train', 'cfg_demo', '--data', data/'store.arrow', '--bpp', data/'bpp', '--run', tmp_path)
    for step in (6, 12):
        r = invoke(*args, '--overrides', o)
        assert r.exit_code == 0 and 'start it again to go on' in r.output
        assert load_checkpoint(tmp_path/'last.pt')['position']['step'] == step
        assert (tmp_path/'best.pt').exists() and not json.loads((tmp_path/'metrics.json').read_text())['finished']
    r = invoke(*args, '--overrides', json.dumps(json.loads(o) | dict(time_budget=0.)))
    assert r.exit_code == 0 and json.loads((tmp_path/'metrics.json').read_text())['finished']


@covers('tracker')
def test_the_tracker_gets_every_line(tmp_path):
    for name, want in (('none', []), ('tensorboard', [1, 2, 3])):
        seen = []

        def sink(numbers, step, files, seen=seen):
            seen.append(step)

        sinks = dict(tensorboard=lambda out, cfg, sink=sink: (sink, lambda: None))
        with tracking(make_cfg('cfg_demo', dict(tracker=name)), tmp_path, sinks) as put:
            for step in (1, 2, 3):
                put(dict(step=step))
        assert seen == want


# ---------------------------------------------------------------- asked to stop before there is a checkpoint

def signal_once(number, function):
    "`function`, which is interrupted the first time it is called"
    todo = [number]

    def interrupted(*args, **kw):
        if todo:
            os.kill(os.getpid(), todo.pop())
        return function(*args, **kw)

    return interrupted


# when the signal comes, where that is, the step at which the run is saved; a step may take as long as it likes
MOMENTS = [('while RNAs are folded', BppStore, 'fill', 0), ('while the first batch is made', tasks, 'training_batch', 0),
           ('in the first step', tasks, 'error_sums', 1), ('while the fold is scored', tasks, 'predict_rows', 4)]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('moment,where,name,step', MOMENTS, ids=[m[0] for m in MOMENTS])
def test_asked_to_stop_before_the_first_checkpoint(data, trained, tmp_path, monkeypatch, capsys, moment, where, name, step, number):
    "Saved at the first opportunity; the same call goes on and ends as if nothing had happened"
    cfg, args = make_cfg('cfg_demo', TINY), (data/'store.arrow', tmp_path, data/'bpp')
    with monkeypatch.context() as m:
        m.setattr(where, name, signal_once(number, getattr(where, name)))
        with pytest.raises(Stopped, match=f'{number.name}: stopped .*last.pt; start the same run again') as stopped:
            train_run(cfg, *args, brief=True)
    assert load_checkpoint(tmp_path/'last.pt')['position']['step'] == step
    assert (f'at step {step} of 8' if step else 'before the first step, with the first weights') in str(stopped.value)
    heard = capsys.readouterr().err
    assert f'{number.name}: stops as soon as what is under way is done and saved' in heard
    metrics, whole = train_run(cfg, *args, brief=True), trained()
    assert metrics['scores'] == whole.metrics['scores']
    assert same(load_checkpoint(tmp_path/'best.pt')['model'], whole.best['model'], 0)
    log = [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()]
    timeless = [[{k: v for k, v in line.items() if k not in COSTS} for line in lines] for lines in (log, whole.log)]
    assert timeless[0] == timeless[1]


def test_stopped_while_folding_keeps_what_was_folded(data, tmp_path, monkeypatch):
    "By the command, whose exit code says that the same one goes on"
    monkeypatch.setattr(tasks.ReactivityTask, 'draw', lambda *_: None)
    looks, args = [], ('ribo_train', 'cfg_demo', '--data', data/'store.arrow', '--bpp', tmp_path/'bpp', '--run', tmp_path/'run',
                       '--overrides', json.dumps(TINY | dict(n_epoch=1)))
    fill = BppStore.fill

    def interrupted(self, sequences, tick):
        def look():
            looks.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            tick()
        return fill(self, sequences, n_jobs=1, tick=look)

    with monkeypatch.context() as m:
        m.setattr(BppStore, 'fill', interrupted)
        m.setattr(type(engine('native')), 'seconds', staticmethod(lambda length: 99.))  # so that they come back one by one
        r = invoke(*args)
    assert r.exit_code == STOPPED and 'folding has stopped' in r.output and 'before the first step' in r.output
    assert looks == [1] and 0 < len(BppStore(tmp_path/'bpp')) < 24
    assert load_checkpoint(tmp_path/'run'/'last.pt')['position']['step'] == 0
    assert invoke(*args).exit_code == 0 and len(BppStore(tmp_path/'bpp')) == 24


# ---------------------------------------------------------------- the networks

# model, field, value, parameter, its shape with d_model 16 and 2 heads
SHAPES = [('squeezeformer', dict(d_model=8), 'blocks.0.attn.out.weight', (8, 8)),
          ('squeezeformer', dict(n_head=4), 'bias.scale', (4, 1, 1)),
          ('squeezeformer', dict(kernel_size=5), 'blocks.0.conv.conv.weight', (16, 1, 5)),
          ('squeezeformer', dict(n_layer=3), 'blocks.2.attn.out.weight', (16, 16)),
          ('mamba', dict(d_model=8), 'layers.0.mixer.far.down.weight', (8, 8)),
          ('mamba', dict(n_head=4), 'layers.0.mixer.far.log_rate', (8,)),
          ('mamba', dict(d_state=6), 'layers.0.mixer.far.up.weight', (16 + 4*6 + 16 + 2*2, 16)),
          ('mamba', dict(n_layer=3), 'layers.2.mixer.far.down.weight', (16, 16)),
          ('pair track', dict(d_pair=12), 'layers.0.rest.pairwise2heads.weight', (2, 12)),
          ('pair track', dict(n_head=4), 'layers.0.rest.pairwise2heads.weight', (4, 8)),
          ('ribonanzanet', dict(d_pair=12), 'transformer_encoder.0.pairwise2heads.weight', (2, 12)),
          ('ribonanzanet', dict(kernel_size=5), 'transformer_encoder.0.conv.weight', (16, 16, 5)),
          ('ribonanzanet', dict(n_head=4), 'transformer_encoder.0.pairwise2heads.weight', (4, 8)),
          ('ribonanzanet', dict(n_layer=3), 'transformer_encoder.2.self_attn.fc.weight', (16, 16)),
          ('seed32', dict(kernel_size=5), 'blocks.0.conv.conv.weight', (16, 1, 5)),
          ('seed32', dict(n_head=4), 'blocks.0.attn.u', (4, 4)),
          ('seed32', dict(n_layer=3), 'blocks.2.attn.out.weight', (16, 16))]


@covers('model', 'd_model', 'n_layer', 'n_head', 'kernel_size', 'd_state', 'd_pair')
@pytest.mark.parametrize('name,more,parameter,shape', SHAPES, ids=lambda v: str(v))
def test_sizes_of_a_network(name, more, parameter, shape):
    state = build(model_cfg(name, **more)).state_dict()
    assert tuple(state[parameter].shape) == shape
    if 'n_layer' in more:
        assert parameter.replace('.2.', '.3.') not in state


@pytest.mark.parametrize('name', MODELS)
def test_each_model_trains_by_its_name(trained, name):
    kind = dict(squeezeformer='Squeezeformer', mamba='RibonanzaMamba', ribonanzanet='RibonanzaNet', seed32='Seed32')
    more = dict(model=name) | MODELS[name]
    tape = trained(**more, n_epoch=1)
    want = 'RibonanzaMambaPairs' if name == 'pair track' else kind[more['model']]
    assert type(tape.model).__name__ == want and tape.metrics['model'] == more['model']
    assert not same(tape.steps[0].before, tape.best['model'], 1e-4)


@covers('dropout')
@pytest.mark.parametrize('name', MODELS)
def test_dropout_in_training_only(trained, name):
    "Half of what passes is zero, in predictions nothing; without it two passes agree"
    batch = toy_batch((40, 31))
    with torch.no_grad():
        for p in (0., .5):
            model, tape = build(model_cfg(name, dropout=p)).train(), Tape()
            with tape():
                differ = not torch.equal(model(batch), model(batch))
            assert differ == bool(p) and (not p or .3 < np.mean(tape.zeros) < .7)
            model.eval()
            assert torch.equal(model(batch), model(batch))


def test_dropout_of_a_run(trained):
    assert .1 < np.mean(trained(dropout=.2).zeros) < .3
    assert not same(trained(dropout=.2).best['model'], trained(dropout=.1, seed=0).best['model'], 1e-4)


def slopes(n):
    return 2. ** -torch.linspace(1, 8, n)[:, None, None]


@covers('position')
def test_positions_by_hand():
    "What attention is told of the distance, and that `rope` turns queries and keys by it"
    batch = toy_batch((12,))
    batch['bpp'] = batch['bpp'] * 0
    i = torch.arange(12)
    far = (i[:, None] - i).abs()
    for position, want in (('alibi', -slopes(2) * far), ('none', torch.zeros(2, 12, 12)),
                           ('rope', torch.zeros(2, 12, 12)), ('dynamic', None)):
        model = build(model_cfg('squeezeformer', position=position, bpp='bias'))
        bias = model.bias(batch['bpp'], batch['mask']).detach().expand(1, 2, 12, 12)[0]
        if want is None:  # learned, of the signed distance alone
            assert torch.equal(bias[:, 3, 5], bias[:, 6, 8]) and not torch.equal(bias[:, 3, 5], bias[:, 5, 3])
        else:
            torch.testing.assert_close(bias, want.expand(2, 12, 12))
        q, k, _ = model.blocks[0].attn.heads(torch.ones(1, 12, 16))
        logits = (q @ k.mT).detach()[0, 0]
        alike = torch.allclose(logits, logits[0, 0].expand(12, 12), atol=1e-5)
        assert alike == (position != 'rope') and torch.allclose(logits[3, 5], logits[6, 8], atol=1e-5)


@covers('bpp')
def test_base_pairs_by_hand():
    "What attention is told of the BPP, and whether the input knows it"
    batch = toy_batch((12,))
    seq, mask, p = batch['seq'], batch['mask'], batch['bpp']
    far = -slopes(2) * (torch.arange(12)[:, None] - torch.arange(12)).abs()
    for kind in ('none', 'mix', 'bias', 'bias+conv'):
        model = build(model_cfg('squeezeformer', bpp=kind)).eval()
        bias, want = model.bias(p, mask).detach(), far[None]
        if kind in ('bias', 'bias+conv'):
            want = want + 4. * p[:, None]
        if kind == 'bias+conv':
            hidden = F.silu(F.conv2d(p[:, None], model.bias.conv1.weight, model.bias.conv1.bias, padding=3))
            want = want + F.conv2d(hidden, model.bias.conv2.weight)
        torch.testing.assert_close(bias, want.detach())
        x = model.embed.kind(seq)
        if kind != 'none':
            partner = (p @ F.one_hot(seq, 5).float()) @ model.embed.partner.weight
            x = x + partner + model.embed.paired(torch.stack([p.sum(-1), p.amax(-1)], -1))
        torch.testing.assert_close(model.embed(seq, p, mask), x)
        with torch.no_grad():
            assert torch.equal(model(batch), model(batch | dict(bpp=p * 0))) == (kind == 'none')


@covers('norm')
@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_norm_before_or_after_by_hand(norm):
    cfg = model_cfg('squeezeformer', norm=norm, n_layer=1)
    model, batch = build(cfg).eval(), toy_batch((12,))
    block, mask = model.blocks[0], batch['mask']
    bias, x = model.bias(batch['bpp'], mask), model.embed(batch['seq'], batch['bpp'], mask)
    steps = (lambda x: block.conv(x, mask)), block.mix1, (lambda x: block.attn(x, bias)), block.mix2
    if norm == 'post':
        x = model.norm(x)
    for step, layer in zip(steps, block.norms, strict=True):
        x = x + step(layer(x)) if norm == 'pre' else layer(x + step(x))
    if norm == 'pre':
        x = model.norm(x)
    torch.testing.assert_close(model(batch), F.linear(x, model.head.weight, model.head.bias))


@covers('head')
@pytest.mark.parametrize('name', ['squeezeformer', 'mamba', 'seed32'])
def test_sigmoid_at_the_end(name):
    batch = toy_batch((12,))
    linear, sigmoid = (build(model_cfg(name, head=h)).eval() for h in ('linear', 'sigmoid'))
    torch.testing.assert_close(sigmoid(batch), linear(batch).sigmoid())


@covers('pair_track')
def test_pair_track_is_read():
    "It has parameters of its own, and the prediction depends on them"
    model, batch = build(model_cfg('pair track')).eval(), toy_batch((12,))
    assert not any('pairs.' in n or '.rest.' in n for n in build(model_cfg('mamba')).state_dict())
    before = model(batch)
    with torch.no_grad():
        model.layers[-1].rest.pairwise2heads.weight.mul_(30)
    assert (model(batch) - before).abs().max() > 1e-5


# ---------------------------------------------------------------- what nothing reads is refused

OTHER = dict(d_model=8, n_layer=1, n_head=1, kernel_size=3, d_state=5, d_pair=6, dropout=.5, norm='post', head='sigmoid',
             position='none', pair_track=True)


def differs(cfg, other):
    "Do two configurations build networks that differ, in their parameters or in what they predict in training?"
    a, b = build(cfg).train(), build(other).train()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (a, b)]
    if shapes[0] != shapes[1]:
        return True
    torch.manual_seed(0)
    first = a(toy_batch((9,)))
    torch.manual_seed(0)
    return not torch.equal(first, b(toy_batch((9,))))


@pytest.mark.parametrize('name', MODELS)
def test_what_a_model_does_not_read_is_refused(name):
    "A field is refused exactly where it changes nothing; the message names those that are read"
    cfg = model_cfg(name, dropout=0.)
    others = OTHER | dict(bpp='mix')
    for field, value in others.items():
        if value == getattr(cfg, field):
            continue
        try:
            made = model_cfg(name, **dict(dropout=0.) | {field: value})
        except ValueError as e:
            assert f'Cfg.{field} is {value!r}' in str(e) and f'{cfg.model} reads d_model, n_layer, n_head' in str(e)
            read = set(str(e).rpartition(' reads ')[2].split(', '))
            assert field not in read and ('kernel_size' in read) == (cfg.model != 'mamba')
            if field not in config.SWITCHES:  # the constructor takes it, and it changes nothing
                assert not differs(cfg, dataclasses.replace(cfg, **{field: value}))
        else:
            assert differs(cfg, made), field


def test_moot_fields_of_training_are_refused():
    for name, more, text in (('cfg_0', dict(sgd_lr=.1), 'only with sgd_epochs'),
                             ('cfg_seed32', dict(graph=True), 'accumulate is 8'),
                             ('cfg_mamba', dict(d_pair=8), 'only with pair_track'),
                             ('cfg_demo', dict(model='mamba', kernel_size=9), 'mamba does not read it')):
        with pytest.raises(ValueError, match=text):
            make_cfg(name, more)
    assert make_cfg('cfg_0', dict(sgd_lr=.1, sgd_epochs=1)).sgd_lr == .1
    assert make_cfg('cfg_0', dict(d_state=32)) == make_cfg('cfg_0')  # its default changes nothing
    assert make_cfg('cfg_demo', dict(model='mamba')).kernel_size == Cfg().kernel_size


def test_a_run_that_would_claim_what_it_never_did_does_not_begin(data, tmp_path):
    with pytest.raises(ValueError, match='mamba does not read it'):
        train_run(dataclasses.replace(config.cfg_mamba, kernel_size=9), data/'store.arrow', tmp_path/'run', data/'bpp')
    assert not (tmp_path/'run').exists()


def test_named_configurations_and_the_plan_of_the_battle_hold_nothing_unread():
    from battle_plan import plan
    for cfg in [*train.cfgs.values(), *(job.cfg for job in plan())]:
        config.check_read(cfg, FIELDS)


def test_a_run_of_before_goes_on(data, tmp_path, monkeypatch):
    "Its folder may hold what is refused today: cfg.json and checkpoints load, and the same run is found done"
    cfg = make_cfg('cfg_demo', TINY | dict(n_epoch=1))
    with monkeypatch.context() as m:
        m.setattr(train, 'check_read', lambda cfg, given: None)
        old = train_run(dataclasses.replace(cfg, d_pair=16), data/'store.arrow', tmp_path, data/'bpp', brief=True)
    assert load_model(tmp_path/'best.pt')[1].d_pair == 16
    for again in (cfg, make_cfg(tmp_path/'cfg.json')):
        assert again.d_pair == Cfg().d_pair
        assert train_run(again, data/'store.arrow', tmp_path, data/'bpp', brief=True)['scores'] == old['scores']


# ---------------------------------------------------------------- what is learned

@pytest.fixture(scope='module')
def three(data, tmp_path_factory):
    "The same store with a third channel: 1M7, half of 2A3's reactivity"
    store, path = Store(data/'store.arrow'), tmp_path_factory.mktemp('three')/'store.arrow'
    meta = {k: v for k, v in store.meta.items() if k not in ('version', 'channels', 'n_row')}
    schema = store_schema(len(store), meta, (*MODS, '1M7'))

    def blocks():
        for k, block in enumerate(store.mapped.blocks):
            store.mapped.prepare([k])
            rows = block.to_pandas()
            for name in CHANNEL_FIELDS:
                rows[f'{name}_1M7'] = rows[f'{name}_2A3']
            rows['reactivity_1M7'] = [values / 2 for values in rows.reactivity_1M7]
            yield block_of(rows, schema)

    write_blocks(path, schema, blocks())
    return path


@covers('channels')
@pytest.mark.parametrize('channels,names', [('2A3,DMS,1M7', ('2A3', 'DMS', '1M7')), ('1M7', ('1M7',)), ('DMS,2A3', ('DMS', '2A3'))])
def test_any_channels_are_learned_and_scored(data, three, tmp_path, channels, names):
    "In this order: batches, loss, score, checkpoint and predictions"
    cfg, tape = make_cfg('cfg_demo', TINY | dict(channels=channels)), Tape()
    with tape():
        metrics = train_run(cfg, three, tmp_path, data/'bpp')
    store = Store(three, names)
    assert store.channels == names and tape.batches[0]['react'].shape[-1] == len(names)
    line = [json.loads(text) for text in (tmp_path/'log.jsonl').read_text().splitlines()][-1]
    scores = metrics['scores']['squeezeformer']
    assert [name for name in scores if name in names] and set(names) <= set(scores)
    assert ('official' in scores) == (set(MODS) <= set(names)) and ('of' in line) == ('official' not in scores)
    assert {f'mae_{name}' for name in names} <= set(line)
    model, cfg = load_model(tmp_path/'best.pt')
    rows = tasks.held_out(store, 0)
    preds = predict_rows(model, store, BppStore(data/'bpp'), rows)
    assert model.channels == names and preds[0].shape[1] == len(names)
    for k, name in enumerate(names):  # each column is that of its channel
        wrong = [np.abs(p[:, k] - store[i][0][:, k].clip(0, 1)) for p, i in zip(preds, rows, strict=True)]
        counts = [~np.isnan(store[i][0][:, k]) & store.SN_filter[i, k] for i in rows]
        if 'official' not in scores or name not in MODS:
            mae = sum(w[c].sum() for w, c in zip(wrong, counts, strict=True)) / sum(c.sum() for c in counts)
            assert scores[name] == pytest.approx(mae, abs=1e-5)


def test_a_channel_that_the_store_lacks_is_said_before_anything(data, tmp_path):
    with pytest.raises(ValueError, match='NMIA'):
        train_run(make_cfg('cfg_demo', TINY | dict(channels='2A3,NMIA')), data/'store.arrow', tmp_path/'run', data/'bpp')
    assert not (tmp_path/'run').exists()


@covers('task')
def test_pairing_is_learned_from_the_sequence_alone(trained, data):
    "The network sees no pairs; its first gradient is that of the mean error in p(unpaired)"
    tape = trained(task='pairing')
    batch, model = tape.batches[0], build(tape.best['cfg']).train()
    assert not batch['bpp'].any() and batch['react'].shape[-1] == 1
    bpp = BppStore(data/'bpp')(tape.sequences([batch]))
    torch.testing.assert_close(batch['react'][..., 0][batch['mask']], (1 - bpp.sum(-1))[batch['mask']])
    model.load_state_dict(tape.steps[0].before)
    (model(batch)[..., 0] - batch['react'][..., 0])[batch['mask']].abs().mean().backward()
    assert same(tape.steps[0].grads, {n: p.grad for n, p in model.named_parameters()})
    assert tape.metrics['scores']['squeezeformer']['unpaired'] == pytest.approx(tape.log[-1]['mae'])
    assert load_model(tape.out/'best.pt')[0].channels == ('unpaired',)


@pytest.mark.parametrize('task', ['reactivity', 'pairing'])
def test_each_task_survives_kills(data, trained, tmp_path, monkeypatch, task):
    "Stopped in every third step, and between last.pt and prev.pt: the same weights and log in the end"
    whole, cfg = trained(task=task, dropout=.1, save_minutes=0.), make_cfg('cfg_demo', TINY | dict(task=task, dropout=.1, save_minutes=0.))

    class Killed(Exception):
        pass

    for k in (3, 2, 1):
        left = [k]

        def die(*_, left=left):
            left[0] -= 1
            if not left[0]:
                raise Killed

        hook = register_optimizer_step_post_hook(die)
        with pytest.raises(Killed):
            train_run(cfg, data/'store.arrow', tmp_path, data/'bpp', brief=True)
        hook.remove()
    (tmp_path/'last.pt').unlink()
    train_run(cfg, data/'store.arrow', tmp_path, data/'bpp', brief=True)
    assert same(load_checkpoint(tmp_path/'best.pt')['model'], whole.best['model'], 0)
    lines = [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k not in COSTS} for line in lines] == [
        {k: v for k, v in line.items() if k not in COSTS} for line in whole.log]


# ---------------------------------------------------------------- nothing is left out

FIELDS = {f.name for f in dataclasses.fields(Cfg)}


def test_every_field_has_a_test():
    "A new field of Cfg needs a test here that fails when it is ignored"
    assert COVERED == FIELDS


@pytest.mark.parametrize('field,value', [('position', 'none'), ('position', 'dynamic'), ('position', 'rope'),
                                         ('bpp', 'none'), ('bpp', 'mix'), ('bpp', 'bias'), ('norm', 'post'),
                                         ('head', 'sigmoid'), ('kernel_size', 3)])
def test_a_run_has_the_network_of_its_configuration(trained, field, value):
    "Its first gradient is that of the network that `build` makes, and of no other"
    tape = trained(**{field: value}, n_epoch=1)
    batch, first, grads = tape.batches[0], tape.steps[0], []
    for cfg in (tape.best['cfg'], trained().best['cfg']):
        model = build(cfg)
        weight = tasks.sn_weight(batch, cfg.weight)
        total = tasks.position_weights(batch['react'], weight).sum()
        loss = tasks.error_sums(model(batch), batch['react'], weight).sum()/total
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert first.grads.keys() == grads[0].keys() and same(first.grads, grads[0])
    assert first.grads.keys() != grads[1].keys() or first.grads['head.weight'].ne(grads[1]['head.weight']).any()
