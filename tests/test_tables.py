"Tables as people have them: odd line ends, packed, with an index, with one modifier, and damaged ones."
import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile

import numpy as np
import pandas as pd
import pytest
from helpers import invoke

from ribo_nb import data
from ribo_nb.bpp import read_sequences
from ribo_nb.convert import read_raw, write_store
from ribo_nb.data import Store, held_out, read_table, simulate, write_holdout
from ribo_nb.jobs import Sequences, read_sequences_file
from ribo_nb.score import check_submission, id_batches, score_files


@pytest.fixture(scope='module')
def raw():
    return simulate(6, seed=11).reset_index(drop=True)


def read(path):
    "Records and profiles of a raw table"
    with tempfile.TemporaryFile() as spool:
        records = read_raw(path, spool)
        spool.seek(0)
        return records, spool.read()


def check_alike(path, want):
    records, profiles = read(path)
    pd.testing.assert_frame_equal(records, want[0])
    assert profiles == want[1]


def error_of(function, *args):
    with pytest.raises(ValueError) as caught:
        function(*args)
    return str(caught.value)


def zipped(files: dict) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


PACK = {
    'gz': lambda name, content: gzip.compress(content),
    'bz2': lambda name, content: bz2.compress(content),
    'xz': lambda name, content: lzma.compress(content),
    'zip': lambda name, content: zipped({name: content, '__MACOSX/._x': b'?', 'folder/': b''}),
}


# --- line ends, quotes, odd numbers

@pytest.mark.parametrize('end', ['\r', '\r\n', '\n\r', '\r\r\n', '\n\n\n', 'mixed'])
def test_line_ends(raw, tmp_path, end, monkeypatch):
    "Any line end gives the same table, also where a block ends within it"
    raw.to_csv(tmp_path/'good.csv', index=False)
    want = read(tmp_path/'good.csv')
    lines = raw.to_csv(index=False).splitlines()
    ends = ['\r', '\n', '\r\n'] if end == 'mixed' else [end]
    text = ''.join(line + ends[k % len(ends)] for k, line in enumerate(lines))
    (tmp_path/'odd.csv').write_bytes(text.encode())
    check_alike(tmp_path/'odd.csv', want)
    (tmp_path/'cut.csv').write_bytes(text.rstrip().encode())
    monkeypatch.setattr(data, 'BLOCK', 3*len(lines[0]))
    check_alike(tmp_path/'cut.csv', want)
    assert len(read_table(tmp_path/'odd.csv', ['sequence'])) == len(raw)


def test_bare_cr_through_the_command(raw, tmp_path):
    (tmp_path/'cr.csv').write_bytes(raw.to_csv(index=False, lineterminator='\r').encode())
    raw.to_csv(tmp_path/'lf.csv', index=False)
    for name in ('cr', 'lf'):
        result = invoke('ribo_data', tmp_path/f'{name}.csv', '--out', tmp_path/f'{name}.arrow', '--folds', 2)
        assert result.exit_code == 0, result.output
    one, two = (Store(tmp_path/f'{name}.arrow') for name in ('cr', 'lf'))
    pd.testing.assert_frame_equal(one.rows, two.rows)
    for x, y in zip(one.arrays(np.arange(len(one))), two.arrays(np.arange(len(two))), strict=True): np.testing.assert_array_equal(x, y)


def test_fields_as_spreadsheets_write_them(raw, tmp_path):
    "Line breaks and commas in quotes, blanks around numbers, signs, true and false, columns in any order, more columns"
    odd = raw.astype(object).where(raw.notna(), '')
    odd['dataset_name'] = 'a,"b"\r\nc'
    raw.assign(dataset_name='a,"b"\r\nc').to_parquet(tmp_path/'good.parquet')
    odd['SN_filter'] = ['TRUE ' if x else 'False' for x in raw.SN_filter]
    odd['reads'] = [f' +{x}.0 ' for x in raw.reads]
    odd['reactivity_0206'] = ['', ' ', 'NA', 'nan', 'NULL', 'na', 'NaN', 'N/A'] + ['   ']*(len(raw) - 8)
    odd.insert(0, 'a note', 'one\nmore')
    odd[odd.columns[::-1]].to_csv(tmp_path/'odd.csv', index=False)
    check_alike(tmp_path/'odd.csv', read(tmp_path/'good.parquet'))


@pytest.mark.parametrize('positions', [177, 700])
def test_any_number_of_positions(tmp_path, positions):
    table = simulate(3, seed=1, n_col=positions)
    table.rename(columns={'sequence_id': 'id'}).to_csv(tmp_path/'t.csv', index=False)
    table.to_parquet(tmp_path/'t.parquet')
    check_alike(tmp_path/'t.csv', read(tmp_path/'t.parquet'))


# --- what is wrong, and where

def spoil(raw, row, column, value):
    table = raw.astype(object)
    table.loc[row-1, column] = value
    return table


@pytest.mark.parametrize('block', [4 << 20, 20_000])
@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
@pytest.mark.parametrize('column', ['reads', 'SN_filter', 'reactivity_0003', 'reactivity_error_0206'])
def test_a_word_where_a_number_belongs(raw, tmp_path, monkeypatch, suffix, column, block):
    monkeypatch.setattr(data, 'BLOCK', block)
    table = spoil(raw, 9, column, 'O.5')
    path = tmp_path/f'bad.{suffix}'
    if suffix == 'csv':
        path.write_text('\n' + table.to_csv(index=False).replace('\n', '\n\n'))
    else:
        table[column] = table[column].astype(str)
        table.infer_objects().to_parquet(path)
    assert f"{path}, row 9: column {column} holds 'O.5', which is not a number" in error_of(read, path)


@pytest.mark.parametrize('change,says', [
    (lambda lines: lines[9].rsplit(b',', 3)[0], 'row 9: not as many fields as the header: 416 where it has 419'),
    (lambda lines: lines[9] + b',1', 'row 9: not as many fields as the header: 420 where it has 419'),
    (lambda lines: lines[9].replace(b'sim_', b'\xe4_'), 'row 9: column dataset_name is not UTF-8 text'),
    (lambda lines: lines[9].replace(b'A', b'A\0', 1), 'row 9: not as many fields'),
    (lambda lines: b'"' + lines[9], 'row 9'),
    (lambda lines: b'x'*10_000_000 + lines[9], 'is longer than 4 MB'),
    (lambda lines: b'"' + b'\n'*10_000_000, 'is longer than 4 MB'),
])
def test_a_damaged_line(raw, tmp_path, change, says):
    lines = raw.to_csv(index=False).encode().splitlines()
    lines[9] = change(lines)
    if b'\0' in lines[9]:
        says = 'row 9'
    (tmp_path/'bad.csv').write_bytes(b'\n'.join(lines))
    message = error_of(read, tmp_path/'bad.csv')
    assert says in message and str(tmp_path/'bad.csv') in message and len(message) < 600


@pytest.mark.parametrize('column', ['sequence_id', 'sequence', 'reads', 'reactivity_0001'])
def test_a_column_that_is_there_twice(raw, tmp_path, column):
    table = pd.concat([raw, raw[[column]]], axis=1)
    table.to_csv(tmp_path/'t.csv', index=False)
    assert f'column(s) {column} are missing or there twice' in error_of(read, tmp_path/'t.csv')
    if column == 'sequence':
        assert 'there twice' in error_of(Sequences, tmp_path/'t.csv')


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-32'])
def test_other_encodings(raw, tmp_path, encoding):
    (tmp_path/'t.csv').write_bytes(raw.to_csv(index=False).encode(encoding))
    for reader in (read, Sequences, read_sequences):
        assert str(tmp_path/'t.csv') in error_of(reader, tmp_path/'t.csv')


# --- fuzz

def mutated(rng, good: bytes) -> bytes:
    "A CSV with a few things wrong, of the kinds that files have on disk"
    text = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(text)))
        kind = rng.integers(8)
        if kind == 0:
            text[at:at] = rng.choice([b'\r', b'\n', b'\0', b'"', b',', b'\xff', b'""', b'\r\r\n', b'\x1a'])
        elif kind == 1:
            ends = [b'\r', b'\n', b'\r\n', b'\n\r']
            text = bytearray(b''.join(x + rng.choice(ends) for x in bytes(text).splitlines()))
        elif kind == 2:
            del text[at:at + int(rng.integers(1, 2000))]
        elif kind == 3:
            text[at] = rng.integers(256)
        elif kind == 4:
            text[at:at] = text[:int(rng.integers(1, 3000))]
        elif kind == 5:
            text = text.replace(b'\n', b'\r')
        elif kind == 6:
            text[at:at] = rng.choice([b'z', b'"', b',', b'1', b'\r', b'\n'])*int(10**rng.uniform(1, 5))
        else:
            del text[at:]
    return bytes(text) or b'\n'


READERS = read, read_table, Sequences, read_sequences, lambda path: list(id_batches(path))


def fuzz(good: list, n: int, seed: int, folder) -> int:
    "How many of n damaged tables could still be read; all others end in a ValueError that names the file"
    rng = np.random.default_rng(seed)
    could = 0
    for k in range(n):
        path = folder/f'{k}.csv'
        path.write_bytes(mutated(rng, good[k % len(good)]))
        for reader in READERS:
            try:
                reader(path)
                could += 1
            except ValueError as error:
                assert path.name in str(error) and len(str(error)) < 1000, str(error)
        path.unlink()
    return could


def test_damaged_tables(raw, tmp_path, monkeypatch):
    "Read or refused in one sentence; nothing else (seeded)"
    monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.setattr(data, 'BLOCK', 30_000)
    submission = pd.DataFrame(dict(id=range(500), reactivity_DMS_MaP=.25, reactivity_2A3_MaP=.5))
    good = [raw.to_csv(index=False).encode(), submission.to_csv(index=False).encode()]
    assert 0 < fuzz(good, 60, 0, tmp_path) < 60*len(READERS)


# --- packed

@pytest.mark.parametrize('how', PACK)
def test_packed_tables(raw, tmp_path, how):
    "Every reader of text reads what is packed as the plain file"
    test = pd.DataFrame(dict(sequence_id=['a', 'b'], sequence=['GGGAAACCC', 'GAUUACA'], id_min=[0, 9], id_max=[8, 15]))
    submission = pd.DataFrame(dict(id=range(16), reactivity_DMS_MaP=.25, reactivity_2A3_MaP=.5))
    files = {
        'train.csv': raw.to_csv(index=False),
        'test.csv': test.to_csv(index=False),
        'test.tsv': test.to_csv(index=False, sep='\t'),
        'rna.fasta': '>a\nGGGAAACCC\n>b\r\nGAUUACA\r\n',
        'sub.csv': submission.to_csv(index=False),
    }
    packed = {}
    for name, text in files.items():
        (tmp_path/name).write_text(text, newline='')
        packed[name] = tmp_path/f'{name}.{how}'
        packed[name].write_bytes(PACK[how](name, text.encode()))
    check_alike(packed['train.csv'], read(tmp_path/'train.csv'))
    assert read_sequences(packed['train.csv']) == read_sequences(tmp_path/'train.csv')
    for name in ('test.csv', 'test.tsv', 'rna.fasta'):
        table = read_sequences_file(packed[name])
        assert table.name.tolist() == ['a', 'b'] and table.sequence.tolist() == test.sequence.tolist()
    assert check_submission(packed['sub.csv'], packed['test.csv']) == 16
    score = score_files([packed['sub.csv']], packed['sub.csv'], packed['test.csv'])
    assert score.official.iloc[0] == 0
    anything = tmp_path/('archive.zip' if how == 'zip' else 'plain.csv')
    anything.write_bytes(packed['test.csv'].read_bytes())
    assert read_sequences_file(anything).name.tolist() == ['a', 'b']


def locked_zip(name, content):
    "A zip archive that says that it needs a password"
    text = bytearray(zipped({name: content}))
    text[6] |= 1
    text[text.rfind(b'PK\x01\x02') + 8] |= 1
    return bytes(text)


def tar_gz(name, content):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_packed_in_a_way_that_is_not_read(raw, tmp_path):
    "Unzip it first, say all readers; of several files in one archive also their names"
    text = raw.to_csv(index=False).encode()
    parquet = raw.to_parquet()
    cases = {
        'two.csv.zip': zipped({'train.csv': text, 'test.csv': text}),
        'none.csv.zip': zipped({}),
        'locked.csv.zip': locked_zip('train.csv', text),
        't.parquet.zip': zipped({'t.parquet': parquet}),
        't.parquet': zipped({'t.parquet': parquet}),
        't.parquet.gz': gzip.compress(parquet),
        't.csv.7z': b"7z\xbc\xaf'\x1c\0\4",
        't.csv.zst': b'(\xb5/\xfd rest',
        't.tar.gz': tar_gz('train.csv', text),
        'twice.csv.gz': gzip.compress(zipped({'train.csv': text})),
    }
    for name, content in cases.items():
        (tmp_path/name).write_bytes(content)
        for reader in (read, Sequences, read_sequences, lambda path: list(id_batches(path))):
            message = error_of(reader, tmp_path/name)
            assert 'unzip it first' in message and name in message
            if name == 'two.csv.zip':
                assert 'train.csv, test.csv' in message


@pytest.mark.parametrize('how', PACK)
def test_packed_and_cut_short(raw, tmp_path, how):
    content = PACK[how]('t.csv', raw.to_csv(index=False).encode())
    for size in (20, len(content)//2, len(content) - 5):
        (tmp_path/f't.csv.{how}').write_bytes(content[:size])
        message = error_of(read, tmp_path/f't.csv.{how}')
        assert 'cut short' in message or 'no rows' in message


# --- tables that pandas saved with an index

INDEXES = ['sequence_id'], ['sequence'], ['sequence_id', 'sequence'], ['dataset_name', 'id_min'], ['id_max']


@pytest.mark.parametrize('index', INDEXES, ids=' '.join)
def test_sequences_with_an_index(tmp_path, index):
    test = pd.DataFrame(dict(sequence_id=['a', 'b'], sequence=['GGGAAACCC', 'GAUUACA'], id_min=[0, 9], id_max=[8, 15],
                             dataset_name='x'))
    test.set_index(index).to_parquet(tmp_path/'t.parquet')
    pd.testing.assert_frame_equal(
        read_sequences_file(tmp_path/'t.parquet'),
        test.rename(columns=dict(sequence_id='name'))[['name', 'sequence', 'id_min', 'id_max']])
    assert read_sequences(tmp_path/'t.parquet') == test.sequence.tolist()
    assert list(Sequences(tmp_path/'t.parquet').sets) == ['x']


@pytest.mark.parametrize('index', [['sequence_id'], ['sequence', 'experiment_type'], ['dataset_name'],
                                   ['reads', 'reactivity_0001', 'reactivity_error_0206'], ['SN_filter']], ids=' '.join)
def test_raw_table_with_an_index(raw, tmp_path, index):
    raw.to_parquet(tmp_path/'plain.parquet')
    raw.set_index(index).to_parquet(tmp_path/'t.parquet')
    check_alike(tmp_path/'t.parquet', read(tmp_path/'plain.parquet'))


@pytest.mark.parametrize('index', ['id', 'reactivity_DMS_MaP', 'Usage'])
def test_solution_and_submission_with_an_index(tmp_path, index):
    test = pd.DataFrame(dict(sequence_id=['a'], sequence=['GGGAAACCC'], id_min=[0], id_max=[8]))
    test.set_index('id_max').to_parquet(tmp_path/'test.parquet')
    solution = pd.DataFrame(dict(id=range(9), reactivity_DMS_MaP=.25, reactivity_2A3_MaP=.5, Usage='Public'))
    solution.set_index(index).to_parquet(tmp_path/'solution.parquet')
    names = list(solution)[:3]
    submission = solution[names].set_index(index if index in names else 'id')
    submission.to_parquet(tmp_path/'submission.parquet')
    files = [tmp_path/'submission.parquet'], tmp_path/'solution.parquet', tmp_path/'test.parquet'
    assert score_files(*files).official.iloc[0] == 0
    assert 'index=False' in error_of(check_submission, tmp_path/'submission.parquet', tmp_path/'test.parquet')


def test_categories_are_text(tmp_path):
    "Columns that pandas calls categories, which Parquet keeps as dictionaries"
    test = pd.DataFrame(dict(sequence_id=['a', 'b'], sequence=['GGGAAACCC', 'GAUUACA'], dataset_name=['x', 'x']))
    test.astype('category').set_index('sequence_id').to_parquet(tmp_path/'t.parquet')
    table = read_sequences_file(tmp_path/'t.parquet')
    assert table.name.tolist() == ['a', 'b'] and table.sequence.tolist() == test.sequence.tolist()


# --- one modifier

@pytest.mark.parametrize('there,gone', [('DMS', '2A3'), ('2A3', 'DMS')])
def test_one_modifier(raw, tmp_path, there, gone):
    "Converted, with a word about what is missing; the fold that is held out counts by what is there"
    table = raw[raw.experiment_type == f'{there}_MaP'].reset_index(drop=True)
    best = table.assign(dataset_name='better ' + table.dataset_name, signal_to_noise=99., SN_filter=1)
    pd.concat([table.assign(signal_to_noise=1.), best]).to_csv(tmp_path/'t.csv', index=False)
    result = invoke('ribo_data', tmp_path/'t.csv', '--out', tmp_path/'s.arrow', '--folds', 2)
    assert result.exit_code == 0, result.output
    assert f'has no {gone} profile: only {there} can be learnt from it and scored' in result.output
    store = Store(tmp_path/'s.arrow')
    assert store.measured == [there]
    rows = held_out(store, 0)
    assert store.rows.dataset_name[rows].str.startswith('better').all()
    assert np.isnan(store.arrays(np.arange(len(store)))[2][..., 0 if gone == '2A3' else 1]).all()
    write_holdout(store, 0, tmp_path/'test')
    solution = pd.read_parquet(tmp_path/'test'/'solution.parquet')
    assert (solution.Usage == 'Private').all() and solution[f'reactivity_{there}_MaP'].notna().any()


def test_both_modifiers_are_not_spoken_of(raw, tmp_path):
    raw.to_parquet(tmp_path/'t.parquet')
    write_store(tmp_path/'t.parquet', tmp_path/'s.arrow', n_fold=2)
    assert Store(tmp_path/'s.arrow').measured == ['2A3', 'DMS']
