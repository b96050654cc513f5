"""What git holds, and what commands may do to it."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers import BIN, ROOT, env, invoke
from test_kaggle import stub, wheel  # noqa: F401 (fixtures)

COPIES = ('out.ipynb', '04_train-Copy1.ipynb', '04_train (2).ipynb')


@pytest.fixture
def tree(tmp_path):
    """The book and the package, without weights."""
    for name in ('nbs', 'ribo_nb', '.ci'):
        shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '*.pt', '.*'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, env=env(), capture_output=True, text=True)


def test_copies_of_a_notebook_are_not_exported(tree):
    """papermill's output and JupyterLab's copies in nbs/ hold old code: the package comes from numbered notebooks only."""
    nbs = tree/'nbs'
    command = (BIN/'papermill', '--prepare-only', '--no-progress-bar', '04_train.ipynb', 'out.ipynb', '-p', 'cfg', 'cfg_0')
    assert run(*command, cwd=nbs).returncode == 0
    for name in COPIES[1:]:
        shutil.copy(nbs/'out.ipynb', nbs/name)
    before = {name: (nbs/name).read_bytes() for name in COPIES}
    book = json.loads((nbs/'04_train.ipynb').read_text())
    cell = next(c for c in book['cells'] if ''.join(c['source']).startswith('#| export\n') and 'def ' in ''.join(c['source']))
    cell['source'] += ['\n', 'edited_after_the_run = True']
    (nbs/'04_train.ipynb').write_text(json.dumps(book, indent=1, ensure_ascii=False) + '\n')

    r = run(BIN/'python', '.ci/notebooks.py', 'export', cwd=tree)
    assert r.returncode == 0, r.stderr
    assert 'edited_after_the_run = True' in (tree/'ribo_nb'/'train.py').read_text()
    r = run('.ci/check', cwd=tree)
    assert r.returncode == 0, r.stdout + r.stderr
    assert before == {name: (nbs/name).read_bytes() for name in COPIES}

    shutil.copy(nbs/'out.ipynb', nbs/'04b_train_again.ipynb')
    r = run('.ci/check', cwd=tree)
    assert r.returncode != 0
    assert 'nbs/04_train.ipynb and nbs/04b_train_again.ipynb both export ribo_nb/train.py' in r.stderr


def test_git_ignores_what_is_made_beside_the_book():
    if not (ROOT/'.git').exists():
        pytest.skip('not a clone')

    def ignored(*names):
        r = run('git', 'check-ignore', '--no-index', *names, cwd=ROOT)
        return set(r.stdout.splitlines())
    made = {'nbs/out.ipynb', 'nbs/04_train-Copy1.ipynb', 'nbs/.jupyter/collaboration_sessions.json',
            '.jupyter_ystore.db', 'nbs/.jupyter_ystore.db-journal', 'datamount/raw/train_data.csv'}
    assert ignored(*made) == made
    book = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT/'nbs').glob('[0-9]*.ipynb') if '-' not in path.name)
    assert ignored(*book, 'nbs/08_templates.ipynb', 'nbs/08a_refine.ipynb', 'datamount/README.md') == set()


def dockerfile():
    """Instructions of the Dockerfile → [(name, rest of its line)]."""
    text = (ROOT/'Dockerfile').read_text().replace('\\\n', ' ')
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and not line.startswith('#')]


def test_docker_image_has_lab_and_its_commit():
    """Lab is installed from what has been copied before, takes root and calls from outside; the commit is told."""
    steps = dockerfile()
    install = steps.index(('RUN', 'make .venv/lab'))
    copied = ' '.join(rest for name, rest in steps[:install] if name == 'COPY')
    makefile = (ROOT/'Makefile').read_text()
    needed = re.findall(r'^\.venv/(?:lab|installed):(.*)$', makefile, re.M)
    for path in ' '.join(needed).replace('.venv/installed', '').split():
        assert path.split('/')[0] in copied.split(), f'{path} is not copied before Lab is installed'

    config = next(rest for name, rest in steps if name == 'RUN' and '/etc/jupyter/jupyter_server_config.json' in rest)
    server = json.loads(next(word for word in shlex.split(config) if word.startswith('{')))['ServerApp']
    assert server == dict(allow_root=True, ip='0.0.0.0', open_browser=False)
    assert ('ENV', 'RIBO_CODE_VERSION=$CODE_VERSION') in steps and ('ARG', 'CODE_VERSION=') in steps
    assert '--build-arg CODE_VERSION=' in makefile


def test_runs_in_an_image_record_the_commit(tmp_path, monkeypatch):
    from ribo_nb.train import code_version as _code_version
    monkeypatch.setenv('RIBO_CODE_VERSION', 'abc1234')
    # No repository here, as in the image.
    monkeypatch.chdir(tmp_path)
    assert _code_version() == 'abc1234'
    monkeypatch.delenv('RIBO_CODE_VERSION')
    assert _code_version() is None
    if (ROOT/'.git').exists():
        monkeypatch.setenv('RIBO_CODE_VERSION', 'abc1234')
        monkeypatch.chdir(ROOT)
        assert _code_version() not in (None, 'abc1234')


def finished_run(folder, job, official):
    """A run folder as training leaves it, reduced to what `collect` reads."""
    folder.mkdir(parents=True)
    scores = {job.cfg.model: dict(official=official)}
    metrics = dict(model=job.cfg.model, scores=scores, parameters=1, finished=True, code=None)
    (folder/'metrics.json').write_text(json.dumps(metrics))
    (folder/'status.json').write_text(json.dumps(dict(sequences=10, steps=2)))
    (folder/'starts.jsonl').write_text('{}\n')
    (folder/'log.jsonl').write_text(json.dumps(dict(step=2, seconds=1.)) + '\n')
    e = pd.DataFrame({'dataset_name': ['PK50_x'], 'length': [115], '2A3': [1.], 'DMS': [2.], 'positions': [9]})
    e.to_parquet(folder/'errors.parquet')


def test_battle_report_keeps_what_other_machines_measured(tmp_path):
    """`bench/battle.py report` in a clone has no runs: results.json stays. With one run, that one line changes."""
    from battle_plan import plan
    from battle_results import collect
    committed = ROOT/'bench'/'battle'
    for name in ('results.json', 'errors.parquet'):
        shutil.copy(committed/name, tmp_path)
    before = {name: (tmp_path/name).read_bytes() for name in ('results.json', 'errors.parquet')}
    with pytest.raises(ValueError, match='found no run with a metrics.json.*battle.py prepare'):
        collect(tmp_path/'nothing', tmp_path)
    assert before == {name: (tmp_path/name).read_bytes() for name in before}

    old = json.loads(before['results.json'])
    job = next(j for j in plan() if (j.table, j.what, j.k) == tuple(old[3][key] for key in ('table', 'what', 'k')))
    finished_run(tmp_path/'battle'/'runs'/job.name, job, official=.5)
    collect(tmp_path/'battle', tmp_path)
    new = json.loads((tmp_path/'results.json').read_text())
    assert new[3]['official'] == .5 and new[:3] + new[4:] == old[:3] + old[4:]
    assert list(new[0]) == list(old[0]) and (tmp_path/'results.json').read_text().startswith('[\n {\n  "table"')

    def others(t):
        return t[(t.table != job.table) | (t.what != job.what) | (t.k != job.k)].reset_index(drop=True)
    errors = pd.read_parquet(tmp_path/'errors.parquet')
    pd.testing.assert_frame_equal(others(errors), others(pd.read_parquet(committed/'errors.parquet')))
    assert len(errors) == len(others(errors)) + 1
    # What no plan names any longer, too.
    planned = {(job.table, job.what, job.k) for job in plan()}
    assert any((line['table'], line['what'], line['k']) not in planned for line in new)


@pytest.mark.parametrize('command', ['report', 'ship'])
def test_battle_without_its_inputs_says_so_and_writes_nothing(tmp_path, command):
    import battle
    from click.testing import CliRunner
    r = CliRunner().invoke(battle.main, ['--folder', str(tmp_path/'battle'), command])
    assert r.exit_code == 1 and r.output.startswith('Error: ') and str(tmp_path/'battle') in r.output
    if (ROOT/'.git').exists():
        changed = run('git', 'status', '--porcelain', 'bench/battle', 'ribo_nb/weights', cwd=ROOT).stdout
        assert changed == ''


def test_dry_run_needs_no_account(stub, monkeypatch):  # noqa: F811
    """The folders are written for a placeholder owner, and the command says so; with --user they are right."""
    monkeypatch.delenv('KAGGLE_USERNAME')
    monkeypatch.delenv('KAGGLE_KEY')
    kernel = stub.project/'datamount'/'kaggle'/'cfg_demo'/'kernel'/'kernel-metadata.json'
    r = invoke('ribo_kaggle', 'push', 'cfg_demo', '--dry-run', '--wheel', stub.extra)
    assert r.exit_code == 0 and 'no Kaggle account' in r.output and '--user NAME' in r.output, r.output
    assert json.loads(kernel.read_text())['id'] == 'your-kaggle-name/ribo-nb-cfg-demo'
    r = invoke('ribo_kaggle', 'push', 'cfg_demo', '--dry-run', '--wheel', stub.extra, '--user', 'me')
    assert r.exit_code == 0 and 'no Kaggle account' not in r.output
    assert json.loads(kernel.read_text())['id'] == 'me/ribo-nb-cfg-demo'
    # A real push goes on needing one.
    r = invoke('ribo_kaggle', 'push', 'cfg_demo', '--wheel', stub.extra)
    assert r.exit_code == 1 and 'no Kaggle account' in r.output and not stub.seen
    r = invoke('ribo_kaggle', 'push', '--infer', 'cfg_demo', '--dry-run', '--wheel', stub.extra)
    assert r.exit_code == 1 and 'nothing was pushed under the name cfg_demo' in r.output


def test_dry_run_folders_are_taken_by_the_official_client(stub):  # noqa: F811
    """The two commands that a dry run names, typed as they stand."""
    r = invoke('ribo_kaggle', 'push', 'cfg_demo', '--dry-run', '--wheel', stub.extra)
    kernel = re.search(r'then: (kaggle kernels push -p \S+)$', r.output.strip())[1]
    dataset = re.search(r'^(\S+/dataset-code): ', r.output, re.M)[1]
    created = run(BIN/'kaggle', 'datasets', 'create', '-p', dataset, cwd=stub.project)
    assert 'Your private Dataset is being created' in created.stdout, created.stdout + created.stderr
    files = stub.datasets['someone/ribo-nb-code'][0]
    assert {name for name in files if name.endswith('.whl')} == {'extra-1-py3-none-any.whl', 'ribo_nb-0.1.0-py3-none-any.whl'}
    pushed = run(BIN/kernel.split()[0], *kernel.split()[1:], cwd=stub.project)
    assert 'version 1 successfully pushed' in pushed.stdout, pushed.stdout + pushed.stderr
    assert stub.kernels['someone/ribo-nb-cfg-demo'][0]['datasetDataSources'] == ['someone/ribo-nb-code']


@pytest.mark.parametrize('command', ['ribo_data', 'ribo_bpp', 'ribo_train', 'ribo_infer', 'ribo_score', 'ribo_kaggle'])
def test_every_command_says_its_version(command):
    from ribo_nb import __version__
    r = invoke(command, '--version')
    assert r.exit_code == 0 and r.output.replace('-', '_') == f'{command} {__version__}\n'


def test_a_held_out_fold_is_not_reported_as_a_leak(mount, tmp_path):
    from ribo_nb.data import Store
    from ribo_nb.score import Sequences, report_overlap
    store = Store(mount/'store.arrow')
    said = report_overlap(Sequences(mount/'test'/'test_sequences.csv'), store)
    assert said.endswith('store.arrow, all in its fold 0: a model that held out fold 0 has not seen them')
    table = store.rows[['sequence_id', 'sequence']].drop_duplicates('sequence')
    table.to_csv(tmp_path/'all.csv', index=False)
    assert 'a model trained on it has seen some of them' in report_overlap(Sequences(tmp_path/'all.csv'), store)


def test_committed_outputs_are_the_same_in_each_run():
    """No folders or sizes of one machine in them; the pieces in which a stream arrives are joined."""
    sys.path.insert(0, str(ROOT/'.ci'))
    import notebooks
    stream = [dict(output_type='stream', name='stderr', text=[text]) for text in ('/tmp/tmpab_12xyz/oom: 2', ' parts\n')]
    assert notebooks.without_traces_of_this_run(stream) == [dict(stream[0], text=['/tmp/folder/oom: 2 parts\n'])]
    for path in (ROOT/'nbs').glob('[0-9]*.ipynb'):
        for cell in json.loads(path.read_text())['cells']:
            said = json.dumps(cell.get('outputs', []), ensure_ascii=False)
            assert not re.search(r'/tmp/tmp\w{8}|[0-9] MB\)', said), f'{path.name}, cell {cell["id"]}'


def test_readme_installs_before_its_first_command():
    """A new user can type the first block as it stands; somebody who was sent a wheel finds the line for it."""
    readme = (ROOT/'README.md').read_text()
    first = re.search(r'```sh\n(.*?)```', readme, re.S)[1]
    commands = [line.split()[0] for line in first.splitlines()]
    assert commands == ['make', 'printf', 'ribo_infer'] and first.startswith('make install && . .venv/bin/activate')
    assert readme.index('```sh') < readme.index('ribo_infer')
    assert 'pip install ribo_nb-0.1.0-py3-none-any.whl' in readme
    demo = run('make', '--no-print-directory', '-n', 'demo', cwd=ROOT).stdout.strip().splitlines()
    assert demo[-1].startswith('echo "open datamount/runs/cfg_demo/report.html')
    assert '--report datamount/runs/cfg_demo/report.html' in demo[-2]


def test_two_notebooks_of_one_module_are_refused(tmp_path):
    "By `make check`, and by an export, before the later of them wins"
    subprocess.run(['cp', '-r', *(str(ROOT/p) for p in ('nbs', 'ribo_nb', 'settings.ini', '.ci')), str(tmp_path)], check=True)
    shutil.copy(tmp_path/'nbs'/'04_train.ipynb', tmp_path/'nbs'/'08_train.ipynb')
    before = (tmp_path/'ribo_nb'/'train.py').read_bytes()
    done = subprocess.run([sys.executable, '.ci/notebooks.py', 'export'], cwd=tmp_path, env=env(), capture_output=True, text=True)
    assert done.returncode and 'both export ribo_nb/train.py' in done.stderr
    assert (tmp_path/'ribo_nb'/'train.py').read_bytes() == before
