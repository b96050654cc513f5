import pytest
from helpers import invoke

from ribo_nb.data import simulate

@pytest.fixture(scope='session')
def mount(tmp_path_factory):
    "A folder with a store of 60 simulated RNAs, its BPPs and fold 0 as a test set"
    d = tmp_path_factory.mktemp('mount')
    simulate(60, seed=2).to_parquet(d/'raw.parquet')
    for args in (('ribo_data',d/'raw.parquet','--out',d/'store.arrow','--holdout',d/'test'), ('ribo_bpp',d/'store.arrow','--out',d/'bpp')):
        r = invoke(*args)
        assert r.exit_code == 0, r.output
    return d
