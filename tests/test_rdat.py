"RDAT: read by what the file says about positions, RNAs and modifiers, or refused with what is missing."
import numpy as np
import pandas as pd
import pytest
from helpers import invoke

from ribo_nb.convert import read_rdat
from ribo_nb.data import Store, sequence_id
from ribo_nb.infer import read_measured
from ribo_nb.jobs import write_rdat

SEQUENCE = 'GGGAACGACUCGAGUAGAGUCGAAAAGGCAUUCGUGCCAAAGAAACAACAACAACAAC'
# A mutant in the part that is measured, from position 27 on.
OTHER = SEQUENCE[:30] + 'C' + SEQUENCE[31:]
FIRST, LAST = 27, 38


def lab_file(path, head='modifier:2A3', rows=None, offset=0, letters=True, version='0.34',
             sequence=SEQUENCE):
    "An RDAT file as the Das laboratory writes it, positions 27 to 38 measured"
    rows = rows or ['']
    positions = range(FIRST, LAST + 1)
    names = [f"{sequence[n-1] if letters else ''}{n + offset}" for n in positions]
    lines = [f'RDAT_VERSION\t{version}', 'NAME\tsome RNA', f'SEQUENCE\t{sequence}',
             'STRUCTURE\t' + '.'*len(sequence), f'OFFSET\t{offset}', '',
             'COMMENT\tmeasured on a Tuesday', 'SEQPOS\t' + '\t'.join(names),
             f'ANNOTATION\tchemical:MgCl2:10mM\t{head}', '']
    lines += [f'ANNOTATION_DATA:{k}\t{notes}' for k, notes in enumerate(rows, 1)]
    for k in range(1, len(rows) + 1):
        values = [f'{k + n/100:.4f}' for n in positions]
        lines.append(f'REACTIVITY:{k}\t' + '\t'.join(values))
    for k in range(1, len(rows) + 1):
        lines.append(f'REACTIVITY_ERROR:{k}\t' + '\t'.join('0.1000' for _ in positions))
    path.write_text('\n'.join(lines) + '\n')
    return path


def expected(k=1):
    "What the k-th row of `lab_file` says, one value per nucleotide"
    out = np.full(len(SEQUENCE), np.nan, np.float32)
    out[FIRST-1:LAST] = [k + n/100 for n in range(FIRST, LAST + 1)]
    return out


@pytest.mark.parametrize('offset', [0, -10, 100])
@pytest.mark.parametrize('letters, version', [(True, '0.34'), (False, '0.34'), (False, '0.24')])
def test_values_go_where_seqpos_says(tmp_path, offset, letters, version):
    path = lab_file(tmp_path/'x.rdat', offset=offset, letters=letters, version=version)
    table = read_rdat(path)
    np.testing.assert_allclose(table.reactivity_2A3_MaP[0], expected(), atol=1e-6)
    assert np.isnan(table.reactivity_DMS_MaP[0]).all()
    assert (table.name[0], table.sequence[0]) == ('some RNA', SEQUENCE)


def test_positions_in_any_order(tmp_path):
    path = lab_file(tmp_path/'x.rdat')
    turned = []
    for line in path.read_text().splitlines():
        key, *fields = line.split('\t')
        numbered = key == 'SEQPOS' or key.startswith('REACTIVITY')
        turned.append('\t'.join([key, *(fields[::-1] if numbered else fields)]))
    path.write_text('\n'.join(turned) + '\n')
    np.testing.assert_allclose(read_rdat(path).reactivity_2A3_MaP[0], expected(), atol=1e-6)


def test_old_keys_and_spaces(tmp_path):
    path = lab_file(tmp_path/'x.rdat', letters=False, version='0.24')
    text = path.read_text().replace('REACTIVITY_ERROR:', 'AREA_PEAK_ERROR ')
    path.write_text(text.replace('REACTIVITY:', 'AREA_PEAK ').replace('\t', ' '))
    table = read_rdat(path)
    np.testing.assert_allclose(table.reactivity_2A3_MaP[0], expected(), atol=1e-6)
    np.testing.assert_allclose(np.nanmean(table.reactivity_error_2A3_MaP[0]), .1)


def test_modifier_of_row_construct_or_file_name(tmp_path):
    rows = [f'modifier:DMS\tsequence:{SEQUENCE}', f'modifier:2A3\tsequence:{SEQUENCE}']
    table = read_rdat(lab_file(tmp_path/'a.rdat', 'temperature:24C', rows))
    np.testing.assert_allclose(table.reactivity_DMS_MaP[0], expected(1), atol=1e-6)
    np.testing.assert_allclose(table.reactivity_2A3_MaP[0], expected(2), atol=1e-6)
    assert len(table) == 1
    table = read_rdat(lab_file(tmp_path/'Round5_2A3.RDAT', 'temperature:24C'))
    np.testing.assert_allclose(table.reactivity_2A3_MaP[0], expected(), atol=1e-6)
    table = read_rdat(lab_file(tmp_path/'Round5_2A3.rdat', 'modifier:DMS'))
    np.testing.assert_allclose(table.reactivity_DMS_MaP[0], expected(), atol=1e-6)
    for name in ('plain.rdat', '2A3_and_DMS.rdat'):
        with pytest.raises(ValueError, match=f'{name}: row 1 .* names no single modifier'):
            read_rdat(lab_file(tmp_path/name, 'temperature:24C'))


def test_other_chemistries_are_not_2a3(tmp_path, capsys):
    with pytest.raises(ValueError, match='1M7, expected 2A3 or DMS'):
        read_rdat(lab_file(tmp_path/'a.rdat', 'modifier:1M7'))
    rows = ['modifier:1M7', 'modifier:DMS']
    assert len(read_rdat(lab_file(tmp_path/'b.rdat', rows=rows))) == 1
    assert '1 of 2 profiles are of 1M7 and left out' in capsys.readouterr().err


def test_names_mutants_and_repeats(tmp_path):
    rows = [f'sequence:{SEQUENCE}\tMAPseq:design_name:first', f'sequence:{OTHER}']
    table = read_rdat(lab_file(tmp_path/'a.rdat', rows=rows))
    assert table.name.tolist() == ['first', sequence_id(OTHER)]
    assert table.sequence.tolist() == [SEQUENCE, OTHER]
    rows = ['mutation:WT', f'mutation:{SEQUENCE[30]}131C', 'mutation:WT']
    table = read_rdat(lab_file(tmp_path/'b.rdat', rows=rows, offset=100))
    assert table.sequence.tolist() == [SEQUENCE, OTHER, SEQUENCE]
    assert table.repeat.tolist() == [1, 1, 2]
    np.testing.assert_allclose(table.reactivity_2A3_MaP[2], expected(3), atol=1e-6)
    with pytest.raises(ValueError, match='mutation .* does not fit'):
        read_rdat(lab_file(tmp_path/'c.rdat', rows=['mutation:A31C']))


@pytest.mark.parametrize('old, new, said', [
    ('SEQPOS\tG27', 'SEQPOS\tC27', 'SEQPOS says C27'),
    ('SEQPOS\tG27', 'SEQPOS\tG28', 'names a position twice|SEQPOS says'),
    ('OFFSET\t0', 'OFFSET\t40', 'lies before the sequence'),
    ('OFFSET\t0', 'OFFSET\tzero', "OFFSET is 'zero'"),
    ('RDAT_VERSION\t0.34', 'RDAT_VERSION\t0.1', 'expected 0.2 or newer'),
    ('RDAT_VERSION\t0.34\n', '', 'expected RDAT_VERSION'),
    ('REACTIVITY:1\t1.2700', 'REACTIVITY:1\tx', "found 'x', expected a number"),
    ('REACTIVITY:1\t1.2700\t', 'REACTIVITY:1\t', '11 values, but SEQPOS names 12'),
    ('REACTIVITY:1', 'REACTIVITY', 'without the number of a row'),
    ('REACTIVITY:1', 'REACTIVITIES:1', 'expected a section of an RDAT file'),
    ('REACTIVITY_ERROR:1', 'REACTIVITY:1', 'is there twice'),
    ('ANNOTATION_DATA:1\t', 'ANNOTATION_DATA:1\tsequence:GGAUU', 'beyond the end of an RNA of 5 nt'),
    ('ANNOTATION_DATA:1\t', 'ANNOTATION_DATA:1\tsequence:GGNUU', "'N'"),
    (f'SEQUENCE\t{SEQUENCE}', 'SEQUENCE\t', 'nothing says which RNA'),
])
def test_refused_with_what_is_wrong(tmp_path, old, new, said):
    path = lab_file(tmp_path/'bad.rdat')
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=said) as error:
        read_rdat(path)
    assert 'bad.rdat' in str(error.value)


def test_without_seqpos_only_whole_profiles(tmp_path):
    text = 'RDAT_VERSION 0.34\nNAME x\nSEQUENCE GGAAC\nANNOTATION modifier:DMS\nREACTIVITY:1 1 2 3 4 5\n'
    (tmp_path/'x.rdat').write_text(text)
    assert read_rdat(tmp_path/'x.rdat').reactivity_DMS_MaP[0].tolist() == [1, 2, 3, 4, 5]
    (tmp_path/'x.rdat').write_text(text.replace(' 5\n', '\n'))
    with pytest.raises(ValueError, match='4 values for an RNA of 5 nt, and no SEQPOS'):
        read_rdat(tmp_path/'x.rdat')


def predictions():
    rng = np.random.default_rng(0)
    rows = []
    for name, sequence in (('one', SEQUENCE), ('two:a', OTHER[:40])):
        row = dict(name=name, sequence=sequence)
        for kind in ('reactivity', 'spread'):
            for modifier in ('2A3', 'DMS'):
                row[f'{kind}_{modifier}_MaP'] = rng.random(len(sequence)).astype(np.float32)
        rows.append(row)
    return pd.DataFrame(rows)


def test_round_trip_through_the_laboratorys_library(tmp_path):
    handler = pytest.importorskip('rdat_kit.handler')
    table = predictions()
    write_rdat(table, tmp_path/'ours.rdat')
    # Ours, read by theirs.
    theirs = handler.RDATFile()
    with open(tmp_path/'ours.rdat') as file:
        theirs.load(file)
    construct, = theirs.constructs.values()
    assert construct.seqpos == list(range(1, len(SEQUENCE) + 1))
    for k, data in enumerate(construct.data):
        modifier = data.annotations['modifier'][0]
        want = table[f'reactivity_{modifier}_MaP'][k//2]
        np.testing.assert_allclose(data.values[:len(want)], want, atol=1e-4)
    # Theirs, read by us: saved again by their library, then a file that only they wrote.
    theirs.save(str(tmp_path/'theirs.rdat'))
    for path in ('ours.rdat', 'theirs.rdat'):
        back = read_rdat(tmp_path/path)
        assert back.name.tolist() == ['one', 'two:a'] and back.sequence.tolist() == table.sequence.tolist()
        for column in ('reactivity_2A3_MaP', 'reactivity_DMS_MaP'):
            np.testing.assert_allclose(np.concatenate(back[column]), np.concatenate(table[column]), atol=1e-4)


@pytest.mark.parametrize('version', [.24, .32, .34])
def test_files_of_the_laboratorys_library(tmp_path, version):
    handler = pytest.importorskip('rdat_kit.handler')
    made = handler.RDATFile()
    made.annotations = dict(modifier=['DMS'])
    values = np.array([[.1, .2, .3]])
    # Before 0.32 their library adds 1 to the positions when it writes.
    positions = [n + 100 - (version < .32) for n in (27, 28, 29)]
    made.save_construct('x', values, SEQUENCE, '.'*len(SEQUENCE), 100, {}, [{}],
                        str(tmp_path/'x.rdat'), '', version, positions, np.array([[.1, .1, .1]]))
    table = read_rdat(tmp_path/'x.rdat')
    np.testing.assert_allclose(table.reactivity_DMS_MaP[0][26:29], [.1, .2, .3], atol=1e-4)
    assert np.isfinite(table.reactivity_DMS_MaP[0]).sum() == 3


def test_commands_read_rdat(mount, tmp_path):
    sequences = Store(mount/'store.arrow').rows.sequence.unique()[:12]
    rows = [f'sequence:{s}\tname:rna{k}' for k, s in enumerate(sequences)]
    path = lab_file(tmp_path/'lab.rdat', 'modifier:2A3', rows, letters=False)
    result = invoke('ribo_data', path, '--out', tmp_path/'lab.arrow', '--folds', 2)
    assert result.exit_code == 0, result.output
    store = Store(tmp_path/'lab.arrow')
    known = dict(zip(store.rows.sequence, range(len(store)), strict=True))
    for k, sequence in enumerate(sequences, 1):
        react = store[known[sequence]][0]
        assert store.rows.sequence_id[known[sequence]] == f'rna{k-1}'
        assert np.flatnonzero(~np.isnan(react[:, 0])).tolist() == list(range(FIRST-1, LAST))
        np.testing.assert_allclose(react[FIRST-1, 0], k + FIRST/100, atol=1e-6)
        assert np.isnan(react[:, 1]).all()
    profiles = read_measured(path)
    np.testing.assert_allclose(profiles[sequences[0]][FIRST-1:LAST, 0], expected()[FIRST-1:LAST], atol=1e-6)
    path.write_text(path.read_text()[:-200])
    result = invoke('ribo_data', path, '--out', tmp_path/'cut.arrow')
    assert result.exit_code == 1 and 'cut short' in result.output and 'Traceback' not in result.output
    assert not (tmp_path/'cut.arrow').exists()


def test_measured_rdat_is_drawn(mount, tmp_path):
    from ribo_nb.config import Cfg, build, save
    cfg = Cfg(d_model=16, n_layer=1, bpp='none', device='cpu', precision='fp32')
    save(tmp_path/'tiny.pt', cfg, model=build(cfg).state_dict())
    sequence = Store(mount/'store.arrow').rows.sequence[0]
    (tmp_path/'x.fa').write_text(f'>x\n{sequence}\n>y\n{sequence[::-1]}\n')
    path = lab_file(tmp_path/'lab_DMS.rdat', 'temperature:24C', [f'sequence:{sequence}'], letters=False)
    arguments = ('ribo_infer', tmp_path/'x.fa', '--ckpt', tmp_path/'tiny.pt', '--out', tmp_path/'x.parquet',
                 '--no-structure', '--figures', tmp_path/'figures', '--measured')
    result = invoke(*arguments, path)
    assert result.exit_code == 0, result.output
    assert list((tmp_path/'figures').glob('*.png')) and 'none of these' not in result.output
    path.write_text(path.read_text().replace('SEQPOS', 'SEQPOSITION'))
    result = invoke(*arguments, path)
    assert result.exit_code == 1 and 'lab_DMS.rdat' in result.output


def test_cut_or_mutated_files_never_lie(tmp_path):
    "500 cuts: the same values or an error in our words; 500 changes: no error that quotes Python"
    rng = np.random.default_rng(1)
    write_rdat(predictions(), tmp_path/'good.rdat')
    whole = (tmp_path/'good.rdat').read_bytes()
    want = read_rdat(tmp_path/'good.rdat')
    path = tmp_path/'bad.rdat'
    refused = 0
    for cut in rng.integers(1, len(whole), 500):
        path.write_bytes(whole[:cut])
        try:
            got = read_rdat(path)
        except ValueError as error:
            refused += 1
            assert 'bad.rdat' in str(error) and 'Error' not in str(error)
            continue
        # All the predictions are there: only the errors that follow them, as a whole, can be gone.
        for column in ('reactivity_2A3_MaP', 'reactivity_DMS_MaP'):
            np.testing.assert_array_equal(np.concatenate(got[column]), np.concatenate(want[column]))
    assert refused > 490
    for _ in range(500):
        text = bytearray(whole)
        for at in rng.integers(0, len(text), 3):
            text[at] = rng.choice(list(b'\t\n .:0AGXn-\xff\x00'))
        path.write_bytes(bytes(text))
        try:
            got = read_rdat(path)
        except ValueError as error:
            assert 'bad.rdat' in str(error) and 'Error' not in str(error)
            continue
        assert len(got)
        for column in ('reactivity_2A3_MaP', 'reactivity_DMS_MaP', 'reactivity_error_2A3_MaP'):
            assert got[column].map(len).tolist() == got.sequence.str.len().tolist()


def test_our_own_tables_are_read_by_the_names_of_their_columns(tmp_path):
    "reactivity_0001 … in any order, also in CSV; a table with a gap is refused with what is missing"
    from ribo_nb.convert import write_store
    from ribo_nb.data import simulate
    raw = simulate(6, seed=3, n_col=180)
    write_store(raw.pipe(saved, tmp_path/'a.parquet'), tmp_path/'a.store.arrow', 2)
    turned = raw[raw.columns[np.random.default_rng(0).permutation(raw.shape[1])]]
    want = Store(tmp_path/'a.store.arrow')
    for name in ('b.parquet', 'b.csv'):
        write_store(saved(turned, tmp_path/name), tmp_path/'b.store.arrow', 2)
        got = Store(tmp_path/'b.store.arrow')
        assert got.rows.sequence.tolist() == want.rows.sequence.tolist()
        np.testing.assert_allclose(got.arrays(np.arange(len(got)))[2], want.arrays(np.arange(len(want)))[2], atol=1e-4)
    for name in ('c.parquet', 'c.csv'):
        saved(turned.drop(columns=['reactivity_0030', 'reactivity_error_0030']), tmp_path/name)
        with pytest.raises(ValueError, match=f'{name}: column.* missing'):
            write_store(tmp_path/name, tmp_path/'c.store.arrow', 2)


def saved(table, path):
    if path.suffix == '.csv':
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    return path
