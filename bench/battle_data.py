"""The battle's data: one table with other folds for each question, and 1M7 profiles to begin with.

Which RNAs a network has never seen decides what its score means.
"""
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ribo_nb.convert import write_store
from ribo_nb.data import Store, sequence_id, store_schema, write_blocks
from ribo_nb.families import assign_folds, cluster

SUFFIX = '.arrow'  # of stores
LEFT_OUT = -9  # fold of rows that a store does not get


def store_path(folder: Path, name: str) -> Path:
    return Path(folder)/f'{name}{SUFFIX}'


def refold(store: Store, path: Path, fold, how: str) -> Path:
    "The same store with other folds (n), without rows of fold LEFT_OUT; `how` becomes its `split`"
    fold = np.asarray(fold, np.int16)
    stays = fold != LEFT_OUT
    meta = store.meta | dict(split=how, n_fold=int(fold.max()) + 1)
    schema = store_schema(int(stays.sum()), meta, store.channels)

    def refolded_blocks():
        first = 0
        for k, block in enumerate(store.mapped.blocks):
            store.mapped.prepare([k])
            own = slice(first, first + block.num_rows)
            first = own.stop
            column = block.schema.get_field_index('fold')
            block = block.set_column(column, 'fold', pa.array(fold[own]))
            yield block.filter(pa.array(stays[own])).replace_schema_metadata(schema.metadata)

    write_blocks(path, schema, refolded_blocks())
    return Path(path)


# Families

def joined_families(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # family of each row, 0..
    "The finest families in which neither rule's family is parted; `a`, `b`: by either rule (n)"
    a = np.unique(a, return_inverse=True)[1]
    b = np.unique(b, return_inverse=True)[1] + a.max() + 1
    n = b.max() + 1
    # Families are nodes, rows are edges between them.
    graph = coo_matrix((np.ones(len(a)), (a, b)), (n, n))
    return connected_components(graph, directed=False)[1][a]


def random_part(sequences: pd.Series, part: float = .5) -> np.ndarray:  # bool, one per row
    "A random part of the sequences, with all their measurements"
    each = sequences.drop_duplicates()
    chosen = each[np.random.default_rng(0).random(len(each)) < part]
    return sequences.isin(chosen).to_numpy()


def is_scan(sequences: pd.Series) -> bool:
    "Many variants of one RNA: at most positions nearly all have the same letter?"
    each = sequences.drop_duplicates()
    if len(each) < 100 or each.str.len().nunique() > 1: return False
    letters = np.array([list(s) for s in each])
    commonest = np.max([(letters == nt).mean(0) for nt in 'ACGU'], 0)
    return commonest.mean() > .8


def thin_scans(sequences: pd.Series, family, most: int = 30) -> np.ndarray:  # bool, one per row
    "All sequences, but of each mutational scan (a family of its own) only `most`"
    keep = np.ones(len(sequences), bool)
    rows = pd.Series(range(len(sequences)))
    for at in rows.groupby(np.asarray(family)).groups.values():
        own = sequences.iloc[at]
        if is_scan(own):
            few = own.drop_duplicates().sample(most, random_state=0)
            keep[at] = own.isin(few)
    return keep


def read_groups(groups: Path) -> pd.DataFrame:
    "sequence_id → source, family, cluster, as they come with the data"
    return pd.read_parquet(groups).drop_duplicates('sequence_id').set_index('sequence_id')


# Stores

def all_folds(rows: pd.DataFrame, groups: Path | None) -> dict:  # name → fold of each row, how
    "The folds of each question; `rows` as `write_store` returns them"
    family = rows.cluster.to_numpy()
    origin = rows.cluster
    if groups is not None:
        known = read_groups(groups)
        theirs = rows.sequence_id.map(known.cluster).fillna(-1 - rows.cluster)
        family = joined_families(family, theirs.to_numpy())
        origin = rows.sequence_id.map(known.family).fillna('')
    fold = assign_folds(family, rows.dataset_name)
    check = np.where(np.isin(fold, [1, 2]), 0, 1)
    is_kept = (check == 0) | thin_scans(rows.sequence, origin)
    library = rows.dataset_name.str.split('_').str[0].map({'PK90': 0, 'PK50': 1})

    length = rows.sequence.str.len()
    is_short = length < length.max()
    n_short = rows.sequence[is_short].nunique()
    n_long = rows.sequence[~is_short].nunique()
    is_drawn = random_part(rows.sequence, n_short/n_long)  # as many long ones as short ones
    by_length = np.where(is_short, 1, np.where(is_drawn, 0, LEFT_OUT))
    return {
        'folds': (fold, 'families by both rules'),
        'check': (check, 'folds 1 and 2 are 0, others 1'),
        'even': (np.where(is_kept, check, LEFT_OUT), 'check, with 30 sequences of each scan left'),
        'library': (library.fillna(LEFT_OUT), 'PK90 0, PK50 1'),
        'length': (by_length, 'longest 0, others 1'),
    }


def prepare_stores(raw: Path, groups: Path | None, folder: Path) -> Store:  # folds
    """Stores of the battle from Kaggle's wide table

    folds: families that share no more than 40 % of their 8-mers never straddle folds. check: folds
    1 and 2 held out together. even: check, with 30 sequences of each scan in training. library:
    train on PK50, test on PK90, and back. length: train on all but the longest, test on these.
    """
    rows = write_store(raw, store_path(folder, 'base'))
    base = Store(store_path(folder, 'base'))
    for name, (fold, how) in all_folds(rows, groups).items():
        refold(base, store_path(folder, name), fold, how)
    return Store(store_path(folder, 'folds'))


def has_no_relative(sequences, known) -> np.ndarray:  # bool, one per sequence
    "Which RNAs are in no family with any of `known`; relatives share 40 % of their 8-mers"
    known = list(known)
    family = cluster([*known, *sequences], share=.4)
    return ~np.isin(family[len(known):], family[:len(known)])


def prepare_1m7(m7: Path, folder: Path):
    """A store of 1M7 profiles to begin with, without relatives of the RNAs of the battle

    1M7 has a scale of its own: divided by its 90th percentile it is on that of 2A3, in whose place
    it stands. A relative would tell what a fold is meant to hide.
    """
    table = pd.read_parquet(m7)
    known = Store(store_path(folder, 'folds')).rows.sequence.unique()
    table = table[has_no_relative(table.sequence, known)]
    wide = [name for name in table if name.startswith('reactivity_')]
    values = [name for name in wide if not name.startswith('reactivity_error_')]
    scaled = table[wide]/np.nanquantile(table[values].to_numpy(float), .9)
    about = pd.DataFrame(dict(
        sequence=table.sequence,
        signal_to_noise=table.signal_to_noise,
        experiment_type='2A3_MaP',
        dataset_name=table.dataset_name + '_1M7',
        sequence_id=table.sequence.map(sequence_id),
        reads=1000,
        SN_filter=(table.signal_to_noise > 1).astype(int),
    ))
    table = pd.concat([about, scaled], axis=1)
    raw = Path(folder)/'1M7_raw.parquet'
    table.drop_duplicates(['sequence_id', 'dataset_name']).to_parquet(raw)
    write_store(raw, store_path(folder, '1M7'))
