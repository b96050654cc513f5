"""The battle's scores: what has to be beaten, what noise leaves, intervals, tables, a picture."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from battle_data import is_scan, read_groups, store_path
from battle_plan import UNCHANGED

from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore
from ribo_nb.data import MODS, Store, encode, held_out
from ribo_nb.metric import UNPAIRED_LEVELS
from ribo_nb.metric import baselines, errors, score, score_by

N_LEVEL = len(UNPAIRED_LEVELS) - 1


def library_of(dataset_name: pd.Series) -> pd.Series:
    return dataset_name.str.split('_').str[0]


# What has to be beaten: a table of three letters in their context.

def context_keys(sequences, bpp: BppStore) -> np.ndarray:
    "Three letters, level of the middle one, are its neighbours paired? A number per position"
    keys = []
    for s in sequences:
        nt = np.pad(encode(s), 1).astype(int)
        unpaired = np.pad(1 - bpp([s])[0].sum(-1).numpy(), 1, constant_values=1.)
        level = np.searchsorted(UNPAIRED_LEVELS, unpaired[1:-1]) - 1
        is_loose = (unpaired > .5).astype(int)
        letters = 25*nt[:-2] + 5*nt[1:-1] + nt[2:]
        keys.append((letters*N_LEVEL + level)*4 + 2*is_loose[:-2] + is_loose[2:])
    return np.concatenate(keys)


def rough_key(key: np.ndarray) -> np.ndarray:
    "Middle nucleotide and level of a context"
    nt = key//(5*4*N_LEVEL) % 5
    level = key//4 % N_LEVEL
    return nt*N_LEVEL + level


def passing_profiles(store: Store, rows) -> pd.DataFrame:
    "Reactivity, clipped to [0,1], at every position of some rows; NaN where it does not pass"
    profiles = [np.where(store.SN_filter[i], store[i][0], np.nan) for i in rows]
    return pd.DataFrame(np.concatenate(profiles).clip(0, 1), columns=list(MODS))


def context_lookup(store: Store, train, test, bpp: BppStore) -> list:  # (l m) per row of `test`
    "Median of each modifier for each context; where that is rare, of its nucleotide and level"
    sequences = store.rows.sequence
    react = passing_profiles(store, train)
    key = context_keys(sequences.iloc[train], bpp)
    wanted = context_keys(sequences.iloc[test], bpp)
    by_context = react.groupby(key)
    is_common = (by_context.count() >= 20).all(axis=1)
    fine = by_context.median()[is_common].reindex(wanted).to_numpy()
    rough = react.groupby(rough_key(key)).median().reindex(rough_key(wanted))
    rough = rough.fillna(react.median()).to_numpy()
    pred = np.where(np.isnan(fine), rough, fine)
    return np.split(pred, np.cumsum(sequences.iloc[test].str.len())[:-1])


def lookups(folder: Path) -> pd.DataFrame:  # data, k, lookup → scores
    "All lookups on the held-out RNAs of the networks, on ViennaRNA's BPPs, which none is given"
    found = []
    vienna = BppStore(folder/'bpp', engine('vienna'))
    for data, n_fold in (('check', 1), ('folds', 3), ('library', 2), ('length', 2)):
        store = Store(store_path(folder, data))
        vienna.fill(store.rows.sequence)
        for k in range(n_fold):
            train = np.flatnonzero(store.rows.fold != k)
            test = held_out(store, k)
            preds = baselines(store, train, store.rows.sequence.iloc[test].tolist(), vienna)
            preds['3-mer and context'] = context_lookup(store, train, test, vienna)
            for name, pred in preds.items():
                table = errors(pred, store, test)
                by_length = score_by(table)['length']
                by_length = {f'{length} nt': value for length, value in by_length.items()}
                found.append(dict(data=data, k=k, lookup=name) | score(table) | by_length)
    return pd.DataFrame(found)


# How low can one get? A measurement has noise, and no model predicts it.

def difference_from_others(stack: np.ndarray) -> np.ndarray:  # (r l m), NaN: not measured → (m)
    "Mean absolute difference of each measurement from the median of the others there"
    if len(stack) > 99:  # of so many, one changes nothing
        return np.nanmean(np.abs(stack - np.nanmedian(stack, 0)), (0, 1))
    differences = []
    for k, own in enumerate(stack):
        others = np.delete(stack, k, 0)
        differences.append(np.abs(own - np.nanmedian(others, 0)))
    return np.nanmean(differences, (0, 1))


def floors(folder: Path, groups: Path) -> pd.DataFrame:  # part → 2A3, DMS, sequences, official
    "What noise leaves: replicates, and mutants of a scan, against each other, clipped to [0,1]"
    store = Store(store_path(folder, 'base'))
    rows = store.rows.assign(row=range(len(store)))[store.SN_filter.all(1)]
    library = library_of(rows.dataset_name)
    family = rows.sequence_id.map(read_groups(groups).family)

    def profiles(some):
        return np.stack([store[i][0].clip(0, 1) for i in some.row])  # r l m

    parts = {}
    for name, part in rows[library != '15k'].groupby(library):
        replicates = [profiles(own) for _, own in part.groupby('sequence') if len(own) > 1]
        each = [difference_from_others(stack) for stack in replicates]
        parts[name] = *np.mean(each, 0), len(replicates)
    for name, part in rows[library == '15k'].groupby(family):
        if is_scan(part.sequence):
            parts[name] = *difference_from_others(profiles(part)), len(part)
    table = pd.DataFrame(parts, index=[*MODS, 'sequences']).T
    return table.assign(official=table[list(MODS)].mean(axis=1))


# Intervals. What comes from one genome, one scan or one cluster of designs is one draw.

def units(rows: pd.DataFrame, groups: Path | None = None) -> np.ndarray:  # a number per row
    "What must not be counted twice for: an RNA's genome, scan or cluster of designs"
    if groups is None: return rows.cluster.to_numpy()
    known = read_groups(groups)
    unit = known.family.where(known.source == '15k', known.cluster.astype(str)).astype(str)
    return pd.factorize(rows.sequence_id.map(unit).fillna(rows.sequence_id))[0]


def redrawn_sums(table: pd.DataFrame, ids: np.ndarray, n: int) -> np.ndarray:  # (1+n 3)
    "Errors of 2A3 and DMS and positions: sums over the units `ids`, then over n draws of them"
    sums = table.groupby('unit')[[*MODS, 'positions']].sum()
    sums = sums.reindex(ids).fillna(0).to_numpy(float)
    # The same draws for both sides of a comparison: what they have in common cancels.
    share = np.full(len(ids), 1/len(ids))
    draws = np.random.default_rng(0).multinomial(len(ids), share, n)
    return np.concatenate([np.ones((1, len(ids))), draws]) @ sums


def with_interval(table: pd.DataFrame, n: int = 1000) -> dict:
    "NAME, NAME_low, NAME_high of 2A3, DMS, official: rows of `errors` with a `unit`; 90 %"
    table = table[table.positions > 0]
    sums = redrawn_sums(table, np.unique(table.unit), n)
    mae = sums[:, :2]/sums[:, 2:]
    columns = dict(zip((*MODS, 'official'), (*mae.T, mae.mean(1)), strict=True))
    scores = {}
    for name, values in columns.items():
        scores[name] = values[0]
        scores[f'{name}_low'], scores[f'{name}_high'] = np.quantile(values[1:], [.05, .95])
    return scores


def interval_of(table: pd.DataFrame, of: str, against: str | None = None, n: int = 1000) -> tuple:
    """Mean over repetitions and its 90 % interval, of a score or of the difference of two

    `table`: errors.parquet of one question, all repetitions of one or two answers.
    """
    table = table[table.what.isin([of, against])]
    ids = np.unique(table.unit)
    total = 0
    for (what, _), one in table.groupby(['what', 'k']):
        sums = redrawn_sums(one, ids, n)
        official = sums[:, :2].mean(1)/sums[:, 2]
        n_repeat = table[table.what == what].k.nunique()
        sign = 1 if what == of else -1
        total = total + sign*official/n_repeat
    low, high = np.quantile(total[1:], [.05, .95])
    return total[0], low, high


# Tables and a picture

def table_of(results: pd.DataFrame, all_errors: pd.DataFrame, question: str,
             against: str | None = None) -> pd.DataFrame:
    "A row per answer: score with interval, each repetition, difference to one of them, cost"
    own_errors = all_errors[all_errors.table == question]
    rows = {}
    for what, runs in results[results.table == question].groupby('what', sort=False):
        middle, low, high = interval_of(own_errors, what)
        rows[what] = row = {'official': f'{middle:.4f}', '90 %': f'{low:.4f} to {high:.4f}'}
        row['runs'] = ' '.join(f'{official:.4f}' for official in runs.official)
        if against and what != against:
            middle, low, high = interval_of(own_errors, what, against)
            row[f'less {against}'] = f'{middle:+.4f} ({low:+.4f} to {high:+.4f})'
        row['parameters'] = f'{runs.parameters.iloc[0]/1e6:.1f} M'
        row['presentations'] = int(runs.presentations.mean())
        row['seconds'] = round(runs.seconds.mean(), 1)
    return pd.DataFrame(rows).T.fillna('').sort_values('official')


def plot_ablation(results: pd.DataFrame, all_errors: pd.DataFrame) -> plt.Figure:
    "What each switch is worth: its interval and its seeds; grey where these disagree on the sign"
    own_errors = all_errors[all_errors.table == 'ablation']
    runs = results[results.table == 'ablation'].set_index('k')
    unchanged = runs[runs.what == UNCHANGED].official
    names = [what for what in runs.what.unique() if what != UNCHANGED]
    intervals = {what: interval_of(own_errors, what, UNCHANGED) for what in names}
    names.sort(key=lambda what: -intervals[what][0])
    fig, ax = plt.subplots(figsize=(7.5, .6 + .36*len(names)), layout='constrained')
    for y, what in enumerate(names):
        middle, low, high = intervals[what]
        each = runs[runs.what == what].official - unchanged
        is_doubtful = low <= 0 <= high or each.min() < 0 < each.max()
        color = '.55' if is_doubtful else '#c8553d' if low > 0 else '#2a6f97'
        ax.plot([low, high], [y, y], color=color, lw=3, alpha=.5, solid_capstyle='round')
        ax.plot(middle, y, 'o', color=color)
        ax.plot(each, np.full(len(each), y) + .22, '|', color=color, ms=5)
        ax.text(1.01, y, f'{middle:+.4f}', transform=ax.get_yaxis_transform(), va='center')
    ax.axvline(0, color='k', lw=.8)
    ax.set(yticks=range(len(names)), yticklabels=names,
           xlabel='official MAE less that of the unchanged model (left: better; ticks: seeds)')
    ax.spines[['top', 'right', 'left']].set_visible(False)
    return fig
