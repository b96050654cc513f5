"The house itself."
import configparser,os,subprocess
from helpers import BIN,ROOT,call,env

def test_every_script_has_help():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    for s in cfg['DEFAULT']['console_scripts'].split():
        r = call(s.split('=')[0], '--help')
        assert r.returncode == 0 and 'Usage' in r.stdout and len(r.stdout) > 300

def test_check_passes_and_notices(tmp_path):
    "`make check` accepts this tree, and refuses a back-edge and a lost tag"
    copy = tmp_path/'x'
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
