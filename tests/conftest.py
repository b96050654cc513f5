import pytest
from helpers import call

@pytest.fixture(scope='session')
def mount(tmp_path_factory):
    "A folder with a store of 60 simulated RNAs, its BPPs and fold 0 as a test set"
    d = tmp_path_factory.mktemp('mount')
    for args in (('ribo_data','--simulate',60,'--out',d/'store.parquet','--holdout',d/'test'), ('ribo_bpp',d/'store.parquet','--out',d/'bpp')):
        r = call(*args, cwd=d)
        assert r.returncode == 0, r.stderr
    return d
