"Error bars: two kinds of RNA, wider for strangers; what was measured is committed."
import json

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from ribo_nb.data import MODS
from ribo_nb.ensemble import SHIPPED, interval, kind_features, likeness, save_ensemble
from ribo_nb.infer import load

SHIPPED_CALIBRATION = json.loads(SHIPPED.read_text())['calibration']


def test_measured_coverage_of_what_ships():
    "What bench/strangers.py measured: 75 to 88 % inside for each kind of RNA and modifier"
    table = pd.read_csv(ROOT/'bench'/'battle'/'strangers.csv')
    ours = table[table.networks.str.startswith('shipped') & table.left_out_inside.notna()]
    kinds = {'PK50', 'PK90', 'coronavirus', 'other virus', 'scan'}
    assert kinds <= set(ours.part) and set(ours.modifier) == set(MODS)
    assert ours.new_inside.between(.75, .885).all()
    # Fitted without the virus or library, too; the widest miss is 'other virus' under 2A3, 89 %.
    assert ours.left_out_inside.between(.75, .895).all()
    # The bars before: too narrow for natural RNAs, too wide for designs.
    coronavirus = ours[ours.part == 'coronavirus']
    assert (coronavirus.old_inside < .75).all()
    assert ours[(ours.part == 'PK50') & (ours.modifier == 'DMS')].old_inside.item() > .9


def noisy(sharp, rng, n=120):
    "A prediction of one RNA and the spread of its members: of a design (sharp), or of a viral window"
    pred = rng.beta(.3, .7, (n, 2)) if sharp else rng.beta(1.2, 2., (n, 2))
    spread = rng.gamma(2., .013 if sharp else .024, (n, 2))
    return pred.astype(np.float32), spread.astype(np.float32)


def test_strangers_get_wider_bars_than_designs():
    rng = np.random.default_rng(0)
    design = 'GGAAAC'*20
    virus = 'GUUACU'*20
    sharp = noisy(True, rng)
    vague = noisy(False, rng)
    like_design = likeness(SHIPPED_CALIBRATION, design, *sharp)
    like_virus = likeness(SHIPPED_CALIBRATION, virus, *vague)
    # A natural composition is enough, however sure the networks are; so is an undecided prediction.
    assert like_design > .8 and like_virus < .1
    assert likeness(SHIPPED_CALIBRATION, virus, *sharp) < .5
    for level in (.5, .8, .9, .95):
        widths = []
        for kind in (like_design, like_virus):
            low, high = interval(*vague, SHIPPED_CALIBRATION, level, kind)
            assert (low <= vague[0]).all() and (high >= vague[0]).all()
            assert low.min() >= 0 and high.max() <= 1
            widths.append((high - low).mean())
        assert widths[1] > 1.15*widths[0]


def test_predictions_come_with_bars_for_their_kind():
    "The bars of `predict` are those of the RNA's own likeness"
    from ribo_nb.infer import predict
    model = load(device='cpu')
    rnas = ['GGAAACGGAUCGAAAGAUCCGAAAACCGAAAGGAAAGAAACAACAACAACAAC', 'GUUACUUUGGUCUUUACUUGUUGUUACUUGCAUUUCUUAGUCUUUGAU']
    for rna in predict(model, rnas).to_dict('records'):
        pred, spread, low, high = (np.stack([rna[f'{what}_{m}_MaP'] for m in MODS], 1)
                                   for what in ('reactivity', 'spread', 'low', 'high'))
        design = likeness(model.calibration, rna['sequence'], pred, spread)
        want = interval(pred, spread, model.calibration, design=design)
        known = np.isfinite(low)  # there are no bars where nothing was ever learnt
        assert 0 < known.sum() < known.size
        for got, bar in zip((low, high), want, strict=True):
            np.testing.assert_allclose(got[known], bar[known], atol=1e-6)


def test_one_kind_still_works_and_half_a_calibration_is_refused(tmp_path):
    "Ensembles of ribo_score --fit know one kind of RNA; version 1 and 2 are read"
    from ribo_nb.config import Cfg, build, save
    cfg = Cfg(d_model=16, n_layer=1, bpp='none', device='cpu', precision='fp32')
    save(tmp_path/'tiny.pt', cfg, model=build(cfg).state_dict())
    model = load(tmp_path/'tiny.pt', device='cpu')
    one = {m: {f'{q:.3f}': [q - .5, 0, 0, 0, 0] for q in (.1, .9)} for m in MODS}
    two = one | dict(designs=one, kind=[0.]*len(kind_features('A', np.zeros((1, 2)), np.zeros((1, 2)))))
    for calibration in (one, two):
        model.calibration = calibration
        save_ensemble(tmp_path/'e.json', model)
        for version in (1, 2):
            text = json.loads((tmp_path/'e.json').read_text()) | dict(version=version)
            (tmp_path/'e.json').write_text(json.dumps(text))
            assert load(tmp_path/'e.json', device='cpu').calibration == calibration
    for broken in (two | dict(kind=[1.]), one | dict(designs=one), two | dict(designs={})):
        model.calibration = broken
        save_ensemble(tmp_path/'e.json', model)
        with pytest.raises(ValueError, match='e.json: is not an ensemble of version 2'):
            load(tmp_path/'e.json', device='cpu')


def test_card_says_both_scores():
    "On folds on which recipes were chosen, and on RNAs that nobody tuned on"
    card = (SHIPPED.parent/'MODEL_CARD.md').read_text()
    assert all(words in card for words in ('0.153', '0.162', '0.203', '0.185', '0.111', 'cc70475', 'strangers.csv'))
