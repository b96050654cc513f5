"""What git holds, and what commands may do to it."""
import json
import re
import shlex
import shutil
import subprocess

import pytest
from helpers import BIN, ROOT, env

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
    from ribo_nb.train import _code_version
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
