"""What ships: weights in half precision; how much each counts and how sure they are; its scores."""
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from battle_data import LEFT_OUT, is_scan, read_groups, store_path
from battle_plan import MEMBERS, plan, run_folder
from battle_scores import context_lookup, library_of, units, with_interval

from ribo_nb.bpp import engine
from ribo_nb.bpp_store import BppStore
from ribo_nb.data import MODS, Store, atomic, held_out
from ribo_nb.ensemble import Ensemble, save_ensemble
from ribo_nb.infer import load
from ribo_nb.score import calibrate, fit_weights, mean_spread
from ribo_nb.config import folding, load_checkpoint, save
from ribo_nb.metric import errors
from ribo_nb.tasks import predict_rows


def half(weights: dict) -> dict:  # name → tensor
    "Fractions with 16 bits"
    return {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}


def fold_predictions(folder: Path, name: str) -> dict:  # sequence → (l m)
    "What a run says of the sequences that it held out; kept in `preds` until it is trained again"
    run = next(run for run in plan() if run.name == name)
    store = Store(store_path(folder, run.data))
    rows = held_out(store, run.cfg.fold)
    sequences = store.rows.sequence.iloc[rows]
    kept = folder/'preds'/f'{name}.npy'
    best = run_folder(folder, name)/'best.pt'
    is_old = kept.exists() and best.exists() and best.stat().st_mtime > kept.stat().st_mtime
    if is_old or not kept.exists():
        bpp = BppStore(folder/'bpp', folding(run.cfg))
        bpp.fill(sequences)
        preds = predict_rows(load(best, flip=run.cfg.flip), store, bpp, rows)
        with atomic(kept) as tmp, open(tmp, 'wb') as file:
            np.save(file, np.concatenate(preds).astype(np.float16))
    values = np.load(kept).astype(np.float32)
    parts = np.split(values, np.cumsum(sequences.str.len())[:-1])
    return dict(zip(sequences, parts, strict=True))


@dataclass
class Judged:
    "What the siblings say of folds 1 and 2, which they held out, and what was measured there"
    store: Store
    rows: np.ndarray
    preds: np.ndarray  # of each member, rows end to end (k n m)
    react: np.ndarray  # NaN where it does not count (n m)

    def counting(self) -> tuple:  # predictions (k n m) and reactivity, clipped (n m)
        counts = ~np.isnan(self.react).any(1)
        return self.preds[:, counts], self.react[counts].clip(0, 1)

    def split(self, pred: np.ndarray) -> list:  # (n m) → (l m) per row
        length = self.store.rows.sequence.iloc[self.rows].str.len()
        return np.split(pred, np.cumsum(length)[:-1])


def read_judged(folder: Path) -> Judged:
    store = Store(store_path(folder, 'check'))
    rows = held_out(store, 0)
    preds = []
    for name in MEMBERS:
        said = fold_predictions(folder, f'sibling-{name}-0')
        preds.append(np.concatenate([said[s] for s in store.rows.sequence.iloc[rows]]))
    react = [np.where(store.SN_filter[i].all(), store[i][0], np.nan) for i in rows]
    return Judged(store, rows, np.stack(preds), np.concatenate(react))


def count_sequences(folder: Path, name: str) -> int:
    "How many sequences of a store are learned from"
    rows = Store(store_path(folder, name)).rows
    return rows.sequence[rows.fold != LEFT_OUT].nunique()


def write_members(folder: Path, out: Path) -> list:  # their files
    "The final runs' weights, in half precision"
    paths = []
    for name in MEMBERS:
        checkpoint = load_checkpoint(run_folder(folder, f'final-{name}-0')/'best.pt')
        cfg = replace(checkpoint['cfg'], start='', time_budget=0.)
        paths.append(out/f'{name}.pt')
        save(paths[-1], cfg, model=half(checkpoint['model']), seen=checkpoint.get('seen'))
    return paths


def ship(folder: Path, out: Path) -> dict:  # who → `errors` of folds 1 and 2
    """Weights of the final runs into `out`, and their ensemble as their siblings' errors have it

    Returns errors of the siblings, of their ensemble and of a lookup. The error bars are of one
    kind; `python bench/strangers.py fit` makes them two.
    """
    finals = [f'final-{name}-0' for name in MEMBERS]
    gone = [name for name in finals if not (run_folder(folder, name)/'best.pt').exists()]
    if gone:
        raise FileNotFoundError(f"{folder/'runs'}: no best.pt in {', '.join(gone)}: "
                                '`python bench/battle.py run --shipped` trains them')
    # All that may be missing is read before the first weights are written.
    n_even = count_sequences(folder, 'even')
    n_1m7 = count_sequences(folder, '1M7')
    judged = read_judged(folder)
    preds, react = judged.counting()
    weights = fit_weights(preds, react)
    calibration = calibrate(*mean_spread(preds, weights), react)

    model = load(write_members(folder, out))
    model = Ensemble(model.members, model.cfgs, model.paths, weights, calibration=calibration)
    data = (f"{n_even:,} sequences of Ribonanza's libraries 15k, PK50 and PK90 (2A3, DMS), "
            f'after {n_1m7:,} of EternaBench (1M7)')
    fitted = dict(held_out='folds 1 and 2', positions=len(react))
    save_ensemble(out/'ensemble.json', model, flip=False, data=data, fitted=fitted)
    return errors_of_members(judged, weights, folder)


def errors_of_members(judged: Judged, weights: np.ndarray, folder: Path) -> dict:
    "who → `errors` of what the siblings held out: each, the ensemble, a lookup"
    store, rows = judged.store, judged.rows
    preds = dict(zip(MEMBERS, judged.preds, strict=True))
    preds['ensemble'] = np.einsum('k,knm->nm', weights, judged.preds)
    split = {who: judged.split(pred) for who, pred in preds.items()}
    vienna = BppStore(folder/'bpp', engine('vienna'))
    vienna.fill(store.rows.sequence)
    split['lookup'] = context_lookup(store, np.flatnonzero(store.rows.fold != 0), rows, vienna)
    return {who: errors(pred, store, rows) for who, pred in split.items()}


# Its scores, by part of the data and by noise. `tables`: who → `errors`, as `ship` returns them

def shipped_scores(tables: dict, rows: pd.DataFrame, groups: Path) -> pd.DataFrame:
    "A row per member and part: scores with intervals, of all, each library, each large scan"
    own = rows.loc[tables['lookup'].index]
    library = library_of(own.dataset_name)
    family = own.sequence_id.map(read_groups(groups).family)
    unit = units(own, groups)
    in_15k = own[library == '15k']
    scans = [name for name, part in in_15k.groupby(family).sequence if is_scan(part)]
    parts = dict(all=library != '')
    parts |= {name: library == name for name in library.unique()}
    parts |= {name: family == name for name in scans}
    found = []
    for (who, table), (part, mask) in itertools.product(tables.items(), parts.items()):
        # A scan is one unit: there, mutants are drawn.
        drawn = table[mask].sequence_id if part in scans else unit[mask]
        n = own.sequence[mask & (table.positions > 0)].nunique()
        scores = with_interval(table[mask].assign(unit=drawn))
        found.append(dict(who=who, part=part, sequences=n) | scores)
    return pd.DataFrame(found)


def scores_by_noise(tables: dict, rows: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    "A row per library, modifier and n-th of signal_to_noise: its median, profiles, each one's MAE"
    counts = tables['lookup'].positions
    own = rows.loc[counts[counts > 0].index]
    libraries = own.groupby(library_of(own.dataset_name))
    found = []
    for (library, part), modifier in itertools.product(libraries, MODS):
        sn = part[f'signal_to_noise_{modifier}']
        for _, some in sn.groupby(pd.qcut(sn, n, labels=False)):
            row = dict(library=library, modifier=modifier, signal_to_noise=some.median(),
                       profiles=len(some))
            for who, table in tables.items():
                row[who] = table.loc[some.index, modifier].sum()/counts[some.index].sum()
            found.append(row)
    return pd.DataFrame(found)
