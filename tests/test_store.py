"The store on disk: round trips, versions, damage, read-only folders, several processes."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, invoke

from ribo_nb.data import MODS, PROFILES, Store, block_of, store_schema, write_blocks

OLD = Path(__file__).parent/'store_v1.parquet'


def assert_same(a: Store, b: Store):
    pd.testing.assert_frame_equal(a.rows, b.rows)
    for x, y in zip(a.arrays(np.arange(len(a))), b.arrays(np.arange(len(b))), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'csv.gz'])
def test_round_trip(mount, tmp_path, kind):
    "Store → raw table → store: the same rows, families, folds and profiles"
    table = tmp_path/f'table.{kind}'
    done = invoke('ribo_data', mount/'store.arrow', '--out', table)
    assert done.exit_code == 0, done.output
    done = invoke('ribo_data', table, '--out', tmp_path/'again.arrow')
    assert done.exit_code == 0, done.output
    assert_same(Store(tmp_path/'again.arrow'), Store(mount/'store.arrow'))


def test_a_store_of_version_1_is_converted_by_the_command_that_is_named(tmp_path, monkeypatch):
    "Written at cc70475: 12 RNAs, one without DMS; rows, families and folds stay"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'old.parquet').write_bytes(OLD.read_bytes())
    refused = invoke('ribo_train', 'cfg_demo', '--data', 'old.parquet', '--run', 'run')
    assert refused.exit_code == 1
    assert 'ribo_data old.parquet --out old.arrow' in refused.output, refused.output
    useless = invoke('ribo_data', 'old.parquet', '--out', 'old.arrow', '--folds', 2)
    assert useless.exit_code == 2 and '--folds does not apply' in useless.output
    done = invoke('ribo_data', 'old.parquet', '--out', 'old.arrow')
    assert done.exit_code == 0, done.output
    old, new = pd.read_parquet('old.parquet'), Store('old.arrow')
    rows = old[[name for name in old if not name.startswith(PROFILES)]]
    pd.testing.assert_frame_equal(new.rows, rows, check_dtype=False)
    for k in range(len(new)):
        for m, mod in enumerate(MODS):
            for kind, name in enumerate(PROFILES):
                np.testing.assert_array_equal(new[k][kind][:, m], old[f'{name}_{mod}'][k])
    assert np.isnan(new.sn).sum() == 1 and new.meta['n_fold'] == 3 and new.meta['seed'] == 5


def test_an_old_store_among_the_data_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path/'datamount'/'parquet'
    folder.mkdir(parents=True)
    (folder/'old.parquet').write_bytes(OLD.read_bytes())
    refused = invoke('ribo_train', 'cfg_0')
    command = 'ribo_data datamount/parquet/old.parquet --out datamount/parquet/old.arrow'
    assert refused.exit_code == 1 and command in refused.output, refused.output


def test_names_that_are_refused(mount, tmp_path):
    for raw, out in ((mount/'raw.parquet', 's.csv'), (mount/'store.arrow', 's.arrow')):
        refused = invoke('ribo_data', raw, '--out', tmp_path/out)
        assert refused.exit_code == 1 and 'name that ends in .' in refused.output
    assert not list(tmp_path.iterdir())


def test_a_store_may_have_the_name_that_scripts_of_before_give_it(mount, tmp_path):
    "`--out s.parquet`: an Arrow store all the same, told by what is in it, with a word about its name"
    done = invoke('ribo_data', mount/'raw.parquet', '--out', tmp_path/'s.parquet')
    assert done.exit_code == 0 and 'better give it a name that ends in .arrow' in done.output
    assert (tmp_path/'s.parquet').read_bytes()[:6] == b'ARROW1'
    store, same = Store(tmp_path/'s.parquet'), Store(mount/'store.arrow')
    assert store.rows.sequence.tolist() == same.rows.sequence.tolist()
    done = invoke('ribo_bpp', tmp_path/'s.parquet', '--out', mount/'bpp')
    assert done.exit_code == 0 and ' 0 sequences folded' in done.output


def test_damage_is_caught_or_harmless(mount, tmp_path):
    "Flipped bits and cuts anywhere: an error of ours, or the very same rows and profiles"
    whole = (mount/'store.arrow').read_bytes()
    want = Store(mount/'store.arrow')
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(whole), size=60), *range(0, 4000, 40)]
    places += list(range(len(whole) - 3000, len(whole), 30))
    caught = 0
    for k, at in enumerate(places):
        bad = bytearray(whole)
        bad[at] ^= 1 << int(rng.integers(8))
        if k % 10 == 9:
            bad = bad[:at]
        (tmp_path/f'{k}.arrow').write_bytes(bad)
        try:
            assert_same(Store(tmp_path/f'{k}.arrow'), want)
        except ValueError as e:
            assert f'{k}.arrow' in str(e)
            caught += 1
        (tmp_path/f'{k}.arrow').unlink()
    assert caught > len(places)/2


def test_a_store_that_is_cut_while_open(mount, tmp_path):
    path = tmp_path/'s.arrow'
    path.write_bytes((mount/'store.arrow').read_bytes())
    store = Store(path)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match='cut short while it was in use'):
        store[0]


def test_any_number_of_channels(tmp_path):
    "Three channels by name, read in any order"
    channels = '2A3', 'DMS', '1M7'
    rows = dict(sequence_id=['a', 'b'], sequence=['GAU', 'ACGUA'], dataset_name=['x', 'x'],
                cluster=[0, 1], fold=[0, 1])
    for m, channel in enumerate(channels):
        profile = [np.arange(3.) + m, np.arange(5.) + m]
        rows |= {f'reactivity_{channel}': profile, f'reactivity_error_{channel}': profile,
                 f'reads_{channel}': [9., 9.], f'signal_to_noise_{channel}': [2., np.nan],
                 f'SN_filter_{channel}': [True, False]}
    schema = store_schema(2, {}, channels)
    write_blocks(tmp_path/'s.arrow', schema, [block_of(rows, schema)])
    store = Store(tmp_path/'s.arrow')
    assert store.channels == channels and store.measured == list(channels)
    seq, mask, react, _ = store.arrays(np.array([0, 1]), [True, False])
    assert seq.tolist() == [[4, 1, 3, 0, 0], [1, 2, 3, 4, 1]]
    assert mask.sum(1).tolist() == [3, 5]
    np.testing.assert_array_equal(react[0, :3, 2], [4, 3, 2])
    other = Store(tmp_path/'s.arrow', ('1M7', '2A3'))
    np.testing.assert_array_equal(other[1][0], store[1][0][:, [2, 0]])


READS = """
import sys
from ribo_nb.data import Store
print(Store(sys.argv[1]).arrays(__import__('numpy').arange(20))[0].sum())
"""


def test_two_processes_read_a_read_only_store(mount, tmp_path):
    "Nothing is written beside it"
    path = tmp_path/'s.arrow'
    path.write_bytes((mount/'store.arrow').read_bytes())
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    command = [sys.executable, '-c', READS, path]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    said = [int(process.communicate(timeout=120)[0]) for process in both]
    tmp_path.chmod(0o755)
    assert said == [Store(path).arrays(np.arange(20))[0].sum()]*2
    assert os.listdir(tmp_path) == ['s.arrow']
