"The house itself."
import builtins,configparser,dis,importlib,json,subprocess,types
import pytest
from helpers import BIN,ROOT,env,invoke

def test_every_script_has_help():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    for s in cfg['DEFAULT']['console_scripts'].split():
        r = invoke(s.split('=')[0], '--help')
        assert r.exit_code == 0 and 'Usage' in r.output and len(r.output) > 300 and (BIN/s.split('=')[0]).exists()

def test_check_passes_and_notices(tmp_path):
    "`make check` accepts this tree, and refuses a back-edge and a lost tag"
    subprocess.run(['cp', '-r', *(str(ROOT/p) for p in ('nbs','ribo_nb','settings.ini','.ci')), str(tmp_path)], check=True)
    def check(): return subprocess.run([str(tmp_path/'.ci'/'check')], cwd=tmp_path, env=env(), capture_output=True, text=True)
    r = check()
    assert r.returncode == 0, r.stdout + r.stderr
    nb = tmp_path/'nbs'/'04_train.ipynb'
    good = nb.read_text()
    nb.write_text(good.replace('"parameters"', '"params"'))
    assert check().returncode != 0
    nb.write_text(good)
    data = tmp_path/'nbs'/'00_data.ipynb'
    data.write_text(data.read_text().replace('import io\\n', 'import io\\n",\n    "from ribo_nb.train import *\\n', 1))
    r = check()
    assert r.returncode != 0 and '00_data.ipynb imports ribo_nb.train' in r.stdout + r.stderr

def test_runtime_needs_no_development_package():
    "What predicts imports neither nbdev nor fastcore nor papermill"
    code = 'import sys, ribo_nb.infer; print([m for m in ("fastcore","nbdev","papermill","IPython") if m in sys.modules])'
    r = subprocess.run([str(BIN/'python'), '-c', code], cwd=ROOT, env=env(), capture_output=True, text=True)
    assert r.stdout.strip() == '[]', r.stdout + r.stderr

def test_the_map_names_every_room():
    "CONTRIBUTING.md says where a thing happens: each notebook that exports a module is in its table"
    table = (ROOT/'CONTRIBUTING.md').read_text()
    rooms = [p.stem for p in sorted((ROOT/'nbs').glob('*.ipynb')) if 'default_exp' in p.read_text()]
    assert len(rooms) > 15 and [room for room in rooms if f'`{room}`' not in table] == []

@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT/'ribo_nb').glob('[a-z]*.py')))
def test_module_defines_every_name_it_uses(name):
    "A notebook can hide a missing import, because its lessons import more than it exports"
    m = importlib.import_module(f'ribo_nb.{name}')
    def names(code):
        yield from (i.argval for i in dis.get_instructions(code) if i.opname == 'LOAD_GLOBAL')
        for c in code.co_consts:
            if isinstance(c, types.CodeType): yield from names(c)
    with open(m.__file__) as f: code = compile(f.read(), m.__file__, 'exec')
    assert {n for n in names(code) if not hasattr(m, n) and not hasattr(builtins, n)} == set()


@pytest.mark.parametrize('line,says', [
    ('def f():\n    import ribo_nb.kaggle', 'imports ribo_nb.kaggle'),
    ('def f():\n    from ribo_nb import data, train', 'imports ribo_nb.train'),
    ("run([sys.executable, '-m', 'ribo_nb.kaggle', 'download'])", 'starts ribo_nb.kaggle'),
    ("run('python -m ribo_nb.kaggle download', shell=True)", 'starts ribo_nb.kaggle'),
    ("run(['ribo_kaggle', 'download'])", 'starts ribo_nb.kaggle'),
    ("importlib.import_module('ribo_nb.train')", 'starts ribo_nb.train'),
    ("'from ribo_nb.kaggle import x'; '`ribo_kaggle download` fetches it'", ''),
    ("run([sys.executable, '-m', 'ribo_nb.convert'])", ''),
])
def test_hidden_arrows_are_found(tmp_path, line, says):
    "Imports inside functions, and strings that load or start a later room; a message may name one"
    subprocess.run(['cp', '-r', str(ROOT/'.ci'), str(ROOT/'settings.ini'), str(tmp_path)], check=True)
    (tmp_path/'nbs').mkdir()
    for name in ('00_data', '00c_convert', '04_train', '06_kaggle'):
        cell = dict(cell_type='code', source=[line if name == '00c_convert' else ''])
        (tmp_path/'nbs'/f'{name}.ipynb').write_text(json.dumps(dict(cells=[cell])))
    r = subprocess.run([str(BIN/'python'), '.ci/no_back_edges.py'], cwd=tmp_path, env=env(), capture_output=True, text=True)
    assert r.returncode == bool(says) and says in r.stderr, r.stderr
