"What folding must not do: overflow silently, listen to the process's settings, spell an RNA in two ways."
import random
import numpy as np,pandas as pd,pytest,torch
from ribo_nb.bpp import Kaggle,engine
from ribo_nb.bpp_store import BppStore,fold_piece
from ribo_nb.data import FLANK3,FLANK5,_flexibility,as_rna,sequence_id,simulate,vienna
from ribo_nb.structure import agreement,crossed,dot_bracket,layout,mutants,partners

COMPLEMENT = str.maketrans('ACGU', 'UGCA')
SHORT = 'GGGGAAAACCCCAUAUGCGCUUUAGCGCAAGGCGCGAAAGCGCUUCCGGAAGCAAAACAUUCG'

def perfect_hairpin(n_pairs, letters='ACGU', seed=0):
    rng = random.Random(seed)
    strand = ''.join(rng.choice(letters) for _ in range(n_pairs))
    return strand + 'GAAA' + strand[::-1].translate(COMPLEMENT)

def helix(bpp, n_pairs):
    "Probabilities of the pairs of `perfect_hairpin`"
    k = np.arange(n_pairs)
    return bpp[k, 2*n_pairs+3-k]

# ---- sums that leave a double's range

@pytest.mark.parametrize(('n_pairs', 'letters'), [(300, 'ACGU'), (200, 'GC')])
def test_vienna_folds_what_overflows_its_own_scale(n_pairs, letters):
    "ViennaRNA#237: these came back without pairs"
    bpp = engine('vienna')(perfect_hairpin(n_pairs, letters))
    assert helix(bpp, n_pairs).mean() > .99
    assert bpp.sum(1).max() <= 1 + 1e-4

def test_vienna_refuses_what_it_cannot_sum(monkeypatch):
    "Whatever the factor per nucleotide: overflow, or probabilities that became zero"
    import ribo_nb.bpp as rooms
    monkeypatch.setattr(rooms, 'sums_fit', lambda fc, *energy: False)
    with pytest.raises(ValueError, match='more than a double can hold.*another engine'):
        engine('vienna')('GGGGAAAACCCC')
    _, why = fold_piece(engine('vienna'), ['GGGGAAAACCCC'], 1e-3)[0]
    assert 'another engine' in why

def test_vienna_notices_lost_probabilities():
    "The total is right, and the outside pass is gone: with this factor ViennaRNA answers a probability of about 0"
    from ribo_nb.bpp import sums_fit
    from ribo_nb.data import vienna_compound
    rna = perfect_hairpin(70, 'GC') + 'A'*150
    fc = vienna_compound(rna)
    energy = fc.mfe()[1]
    assert sums_fit(fc, energy)
    assert not sums_fit(fc, 3.2*energy)

def test_native_at_extreme_input():
    fold = engine('native')
    assert helix(fold(perfect_hairpin(200, 'GC')), 200).mean() > .99

# ---- the state of the process

def all_folds():
    "What every door to ViennaRNA and to the native engine answers"
    react = np.linspace(0, 1, len(SHORT))
    pairs = [engine(name)(SHORT) for name in ('vienna', 'native')]
    structures = [dot_bracket(SHORT), dot_bracket(SHORT, react)]
    return [*pairs, *structures, _flexibility(SHORT, 7), layout('((((....))))')]

def assert_same(a, b):
    for x,y in zip(a, b, strict=True): np.testing.assert_array_equal(x, y)

@pytest.fixture
def globals_of_vienna():
    "ViennaRNA's global model details, put back after the test"
    RNA = vienna()
    names = ['temperature', 'dangles', 'noLP', 'noGU', 'uniq_ML', 'circ', 'gquad', 'special_hp', 'sfact', 'betaScale', 'salt',
             'min_loop_size', 'max_bp_span', 'energy_set', 'pf_smooth', 'compute_bpp', 'pf_scale', 'nonstandards', 'logML',
             'fold_constrained', 'backtrack_type', 'noGUclosure', 'cut_point', 'rna_plot_type']
    before = {n: getattr(RNA.cvar, n) for n in names}
    yield RNA
    for n,v in before.items(): setattr(RNA.cvar, n, '' if v is None else v)
    RNA.params_load_RNA_Turner2004()

def test_folding_ignores_global_model_details(globals_of_vienna):
    before = all_folds()
    odd = dict(temperature=65., dangles=0, noLP=1, noGU=1, uniq_ML=1, circ=1, gquad=1, special_hp=0, sfact=2., betaScale=2.,
               salt=.1, min_loop_size=5, max_bp_span=10, energy_set=1, pf_smooth=0, compute_bpp=0, pf_scale=3., logML=1,
               fold_constrained=1, backtrack_type='C', noGUclosure=1)
    for name,value in odd.items(): setattr(globals_of_vienna.cvar, name, value)
    assert_same(all_folds(), before)

@pytest.mark.parametrize('name', ['RNA_Turner1999', 'DNA_Mathews2004', 'RNA_Andronescu2007'])
def test_folding_ignores_loaded_parameters(globals_of_vienna, name):
    before = all_folds()
    getattr(globals_of_vienna, f'params_load_{name}')()
    for _ in range(2):
        globals_of_vienna.fold(SHORT)
        globals_of_vienna.pf_fold(SHORT)  # now ViennaRNA has other factors at hand
        assert_same(all_folds(), before)

def test_overflowing_sums_with_loaded_parameters(globals_of_vienna):
    "Also where the factor per nucleotide is taken from the minimum free energy"
    rna = perfect_hairpin(300, 'GC')
    before = engine('vienna')(rna)
    globals_of_vienna.params_load_RNA_Andronescu2007()
    globals_of_vienna.pf_fold(SHORT)
    np.testing.assert_array_equal(engine('vienna')(rna), before)

def test_energies_are_read_right_after_somebody_elses(globals_of_vienna):
    "Also when ours are computed for the first time in a process that has other ones; and it keeps its own"
    from ribo_nb.data import _vienna_energies
    before = all_folds()
    globals_of_vienna.params_load_RNA_Turner1999()
    theirs = globals_of_vienna.cvar.ML_closing37
    _vienna_energies.cache_clear()
    assert_same(all_folds(), before)
    assert globals_of_vienna.cvar.ML_closing37 == theirs

def test_parameter_files_stay_apart(globals_of_vienna, tmp_path):
    "Two engines with different parameters in one process, in any order, each as if it were alone"
    globals_of_vienna.params_load_RNA_Turner1999()
    globals_of_vienna.params_save(str(tmp_path/'turner1999.par'))
    globals_of_vienna.params_load_RNA_Turner2004()
    globals_of_vienna.params_save(str(tmp_path/'turner2004.par'))
    default = engine('vienna')(SHORT)
    old = engine('vienna', tmp_path/'turner1999.par')(SHORT)
    same = engine('vienna', tmp_path/'turner2004.par')(SHORT)
    assert abs(old - default).max() > .1
    np.testing.assert_array_equal(same, default)
    np.testing.assert_array_equal(engine('vienna')(SHORT), default)
    (tmp_path/'other.par').write_text('something else')
    with pytest.raises(ValueError, match='other.par: does not begin with'): engine('vienna', tmp_path/'other.par')

def test_folding_ignores_numpys_error_state(tmp_path):
    before = all_folds()
    with np.errstate(all='raise'):
        assert_same(all_folds(), before)
        bpps = BppStore(tmp_path, engine('native'))
        long = FLANK5 + SHORT*3 + FLANK3
        bpps.fill([long], quiet=True)
        assert bpps([long]).isfinite().all()
        simulate(4, seed=1)

def test_dense_and_predict_ignore_torchs_default_dtype(tmp_path):
    from ribo_nb.infer import load, predict
    bpps = BppStore(tmp_path, engine('native'))
    bpps.fill([SHORT], quiet=True)
    before,table = bpps([SHORT]),predict(load(), [SHORT], bpp=bpps)
    torch.set_default_dtype(torch.float64)
    try: after,again = bpps([SHORT]),predict(load(), [SHORT], bpp=bpps)
    finally: torch.set_default_dtype(torch.float32)
    assert after.dtype == before.dtype and (after == before).all()
    for c in table.columns[2:]: np.testing.assert_array_equal(again[c][0], table[c][0])

# ---- one spelling

@pytest.mark.parametrize('spell', [str.lower, lambda s: s.replace('U', 'T'), lambda s: s.replace('U', 't').lower()])
def test_T_is_U_at_every_entrance(tmp_path, spell):
    other,react = spell(SHORT),np.linspace(0, 1, len(SHORT))
    assert as_rna(other) == SHORT
    assert dot_bracket(other) == dot_bracket(SHORT)
    assert dot_bracket(other, react) == dot_bracket(SHORT, react)
    assert mutants(other) == mutants(SHORT)
    np.testing.assert_array_equal(_flexibility(other, 1), _flexibility(SHORT, 1))
    for name in ('native', 'vienna'):
        np.testing.assert_array_equal(engine(name)(other), engine(name)(SHORT))
        bpps = BppStore(tmp_path/name, engine(name))
        assert bpps.fill([other, SHORT], quiet=True) == 1 and len(bpps) == 1
        assert (bpps([other]) == bpps([SHORT])).all() and not bpps.missing([other])

def test_a_letter_that_is_none_is_refused():
    for ask in (dot_bracket, engine('vienna'), engine('native'), mutants, lambda s: BppStore().fill([s], quiet=True)):
        with pytest.raises(ValueError, match="contains"): ask('GGGNAAACCC')

# ---- brackets

def test_first_case_of_a_letter_opens():
    want = [9, 8, -1, -1, 13, 12, -1, -1, 1, 0, -1, -1, 5, 4]
    for s in ('AA..((..aa..))', 'aa..((..AA..))', 'zz..((..ZZ..))', '[[..aa..]]..AA'): assert partners(s).tolist() == want
    assert partners('aA.Bb').tolist() == [1, 0, -1, 4, 3]
    assert (crossed('aa..((..AA..))') == crossed('[[..((..]]..))')).all()
    react = np.linspace(0, 1, 14)
    assert agreement('aa..((..AA..))', react) == agreement('AA..((..aa..))', react)
    for bad,why in {'a.A.A': 'position 5.*closes nothing', 'aa.A': 'position 1.*never closed', 'é': 'no dot-bracket', ')': 'closes nothing'}.items():
        with pytest.raises(ValueError, match=why): partners(bad)

# ---- Kaggle's text files

def test_kaggle_text_file_is_checked(tmp_path):
    s = 'GGGGAAAACCCC'
    path = tmp_path/f'{sequence_id(s)}.txt'
    good = ''.join(f'{i+1} {12-i} 0.9{i}\n' for i in range(4))
    for text in (good, good + 'None\n', good + '\n'):
        path.write_text(text)
        i,j,p = Kaggle(tmp_path).pairs(s.replace('U', 'T').lower())
        assert (i.tolist(), j.tolist(), p.tolist()) == ([0, 1, 2, 3], [11, 10, 9, 8], [.9, .91, .92, .93])
    bad = {b'': 'is empty', b'None\n': 'no line', b'1 13 0.5\n': 'line 1: pairs positions 1 and 13 of an RNA of 12 nt',
           b'0 12 0.5\n': 'positions 0 and 12', b'3 3 0.5\n': 'positions 3 and 3', b'1 12 1.5\n': 'line 1: a probability of 1.5',
           b'\xff\xfe1 12 0.5\n': 'UTF-8', good.encode() + b'1 1': 'line 5: expected', good.encode() + b'5 8 0.': 'line 5: expected',
           b'1 12 nan\n': 'line 1: expected', b'1 12 -0.5\n': 'line 1: expected', b'1 99999999999999999999 0.5\n': 'of an RNA of 12 nt'}
    for data,why in bad.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=why): Kaggle(tmp_path)(s)
        with pytest.raises(ValueError, match='have no BPP'): BppStore(None, Kaggle(tmp_path)).fill([s], 1, quiet=True)
    path.write_text('1 12 0.9\n12 1 0.9\n')
    with pytest.raises(ValueError, match='the same pair twice'): Kaggle(tmp_path)(s)
    path.write_text('1 12 0.9\n1 11 0.9\n')
    with pytest.raises(ValueError, match='1.8'): Kaggle(tmp_path)(s)

def test_native_scale_under_numpys_error_state():
    "Factors of a long RNA become zero in a double: no error, whatever NumPy is told"
    from ribo_nb.bpp import scaled
    fold = engine('native')
    want = scaled(fold.weights, 2000, np.exp(2.5))
    with np.errstate(all='raise'): assert_same(scaled(fold.weights, 2000, np.exp(2.5)), want)

def test_build_ignores_torchs_default_dtype():
    from ribo_nb.config import build, make_cfg
    cfg = make_cfg('cfg_demo', dict(d_model=16, n_layer=1))
    before = build(cfg).state_dict()
    torch.set_default_dtype(torch.float64)
    try: after = build(cfg).state_dict()
    finally: torch.set_default_dtype(torch.float32)
    for k,v in before.items(): assert after[k].dtype == v.dtype and (after[k] == v).all()

def test_report_ignores_pandas_options(tmp_path):
    from ribo_nb.structure import write_report
    table = pd.DataFrame(dict(name=['x'*80], value=[1.23456]))
    write_report(tmp_path/'a.html', 'title', [('', table)])
    with pd.option_context('display.precision', 1, 'display.max_colwidth', 8, 'display.float_format', '{:.0f}'.format):
        write_report(tmp_path/'b.html', 'title', [('', table)])
    assert (tmp_path/'a.html').read_text() == (tmp_path/'b.html').read_text()

# ---- published definitions

# a design of RMDB's OpenKnotPilot_PK50 (RHEt1_Miseq_PK50_Twist.rdat, row 1)
PK50 = '.....((((((.....))))))....[[...(((((.((((....]]((((((....)))))).)))).)))))..(((((((....))))))).....................'

@pytest.mark.parametrize(('first', 'last', 'eterna', 'quality'), [
    (0, 114, 58.26086956521739, 18.181818181818183), (26, 94, 53.62318840579711, 18.181818181818183),
    (27, 60, 64.70588235294117, 8.333333333333332), (40, 110, 59.154929577464785, 4.166666666666666)])
def test_openknot_scores_equal_the_authors(first, last, eterna, quality):
    "Values by eternagame/OpenKnotScorePipeline's scoring.py; a region that cuts pairs, too"
    react = np.full(len(PK50), np.nan)
    react[first:last+1] = np.abs(np.sin(np.arange(len(PK50))*1.7)).round(2)[first:last+1]
    got = agreement(PK50, react)
    want = dict(eterna_score=eterna, crossed_pair_quality=quality, openknot_score=(eterna + quality)/2)
    assert got == pytest.approx(want)

def test_openknot_scores_of_special_cases():
    "Without crossed pairs the quality is 0, a gap in the data counts against it, no data no score"
    assert agreement('((..))', [0, 0, 1, 1, 0, 0]) == dict(eterna_score=100., crossed_pair_quality=0., openknot_score=50.)
    assert agreement('([.)].', [0, np.nan, 1, 0, 0, 1])['crossed_pair_quality'] == 75.
    assert np.isnan(list(agreement('([.)].', [np.nan]*6).values())).all()
